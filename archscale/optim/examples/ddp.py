"""torchrun --standalone --nproc_per_node=2 -m archscale.optim.examples.ddp

DistributedDataParallel on the CPU: the ranks share out the orthogonalizations.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from archscale.optim import MatrixOptimizer, matrix_groups
from archscale.optim.examples.digits import ConvNet, accuracy, batches


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(ConvNet())
    groups = matrix_groups(model, head="head", element={"lr": 3e-3})
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
