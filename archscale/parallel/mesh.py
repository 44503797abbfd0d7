"""Device meshes: world size = replicate × shard, in that order (replicas far apart, shards close
together)."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def build_mesh(device: torch.device, replicate: int, shard: int) -> DeviceMesh:
    """The 2-D mesh (`replicate`, `shard`) over all ranks."""
    return init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def build_expert_mesh(device: torch.device, replicate: int, shard: int, expert: int) -> DeviceMesh:
    """The same ranks as a 3-D mesh (`replicate`, `shard`, `expert`), for the experts: `expert`
    neighbouring ranks of a shard group spread the experts, and the remaining `shard // expert`
    shard each one's part further."""
    return init_device_mesh(
        device.type,
        (replicate, shard // expert, expert),
        mesh_dim_names=("replicate", "shard", "expert"),
    )
