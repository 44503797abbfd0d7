"""torchrun --standalone --nproc_per_node=2 -m archscale.optim.examples.fsdp2

FSDP2 on the CPU: every rank holds some rows of each matrix. The optimizer is made after sharding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from archscale.optim import MatrixOptimizer, matrix_groups
from archscale.optim.examples.digits import ConvNet, accuracy, batches


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    model = ConvNet()
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = matrix_groups(model, head=model.head, element={"lr": 3e-3})
    optimizer = MatrixOptimizer(
        groups, lr=0.05, rule="orscale", weight_decay=5e-4, compute_dtype=torch.float32
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=56)
    for images, labels in batches(epochs=4, rank=rank, ranks=ranks):
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    right = accuracy(model)
    if rank == 0:
        print(f"loss {loss:.4f}, held-out accuracy {right:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
