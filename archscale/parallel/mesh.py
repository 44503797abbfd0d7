"""Device meshes: how the ranks of a run share a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class MeshSizes:
    """Ranks in each direction; replicate × shard is the world size.

    Replicas are the outer direction, so the shards of one replica, which talk most, are neighbours.
    """

    replicate: int = 1
    """Copies of the parameters."""
    shard: int = 1
    """Ranks over which one copy is spread."""
    expert: int = 1
    """Ranks of a shard group over which experts are spread; divides `shard`."""


def build_mesh(device: torch.device, sizes: MeshSizes) -> DeviceMesh:
    """The 2-D mesh (`replicate`, `shard`) over all ranks."""
    return init_device_mesh(
        device.type, (sizes.replicate, sizes.shard), mesh_dim_names=("replicate", "shard")
    )


def build_expert_mesh(device: torch.device, sizes: MeshSizes) -> DeviceMesh:
    """The same ranks as a 3-D mesh (`replicate`, `shard`, `expert`), for the experts: `expert`
    neighbouring ranks of a shard group spread the experts, and the other direction of the group
    shards each one's part further."""
    return init_device_mesh(
        device.type,
        (sizes.replicate, sizes.shard // sizes.expert, sizes.expert),
        mesh_dim_names=("replicate", "shard", "expert"),
    )
