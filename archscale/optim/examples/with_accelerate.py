"""torchrun --standalone --nproc_per_node=2 -m archscale.optim.examples.with_accelerate

accelerate: FSDP2 on GPUs, DistributedDataParallel on a CPU, where accelerate has nothing else.
`prepare` puts the sharded parameters into an optimizer that was made before there were any.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.nn.functional import cross_entropy

from archscale.optim import MatrixOptimizer, matrix_groups
from archscale.optim.examples.digits import ConvNet, accuracy, batches


def train(accelerator: Accelerator) -> str:
    """Final loss, held-out accuracy and the class of the parameters that were trained."""
    torch.manual_seed(0)
    model = ConvNet()
    groups = matrix_groups(model, head=model.head, element={"lr": 3e-3})
    optimizer = MatrixOptimizer(
        groups, lr=0.05, rule="orscale", weight_decay=5e-4, compute_dtype=torch.float32
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=56)
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for images, labels in batches(epochs=4, rank=rank, ranks=ranks):
        loss = cross_entropy(model(images.to(accelerator.device)), labels.to(accelerator.device))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    kind = type(next(model.parameters())).__name__
    return f"loss {loss:.4f}, held-out accuracy {accuracy(model):.4f} ({kind} on {ranks} ranks)"


def main() -> None:
    gpu = torch.cuda.is_available()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if gpu else None
    accelerator = Accelerator(cpu=not gpu, fsdp_plugin=plugin)
    accelerator.print(train(accelerator))
    accelerator.end_training()


if __name__ == "__main__":
    main()
