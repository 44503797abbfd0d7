"""torchrun --standalone --nproc_per_node=2 -m archscale.optim.examples.deepspeed_zero

ZeRO 2 lays all parameters end to end and gives each rank a flat piece of that: no matrix rule can
find its matrices there. So DeepSpeed gets a stand-in, whose step hands this rank's fragment of each
parameter to `MatrixOptimizer`. (`archscale train`, `parallel.engine=deepspeed`, has all stages.)
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from archscale.optim import MatrixOptimizer, matrix_groups
from archscale.optim.examples.digits import ConvNet, accuracy, batches


class StandIn(torch.optim.Optimizer):
    real: MatrixOptimizer
    fragments: list[tuple[torch.nn.Parameter, int]]  # and where each begins in the flat piece

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradient = self.param_groups[0]["params"][0].grad
        for fragment, start in self.fragments:
            fragment.grad = gradient[start : start + len(fragment)]
        self.real.step()


def cut(p: Any, flat: torch.Tensor) -> tuple[torch.nn.Parameter, int, int]:
    """This rank's fragment of `p`, a view of the flat piece; its start there and within `p`."""
    count = start = lo = 0
    if p._hp_mapping is not None:  # else all of p is on other ranks
        inside, target = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
        count, start, lo = inside.numel, target.start, inside.start
    return torch.nn.Parameter(flat.detach()[start : start + count]), start, lo


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled at the start
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = ConvNet()
    groups = matrix_groups(model, head=model.head, element={"lr": 3e-3})
    stand_in = StandIn(model.parameters(), {"lr": 0.0})
    config = {
        "train_micro_batch_size_per_gpu": 50,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=stand_in, config=config)
    stand_in.fragments = []
    for group in groups:
        names, whole = zip(*group["params"])
        pieces = [cut(p, stand_in.param_groups[0]["params"][0]) for p in whole]
        group["params"] = [(name, piece) for name, (piece, *_) in zip(names, pieces)]
        group["fragments"] = [(tuple(p.shape), lo) for p, (*_, lo) in zip(whole, pieces)]
        stand_in.fragments += [(fragment, start) for fragment, start, _ in pieces]
    stand_in.real = MatrixOptimizer(
        groups, lr=0.05, rule="orscale", weight_decay=5e-4, compute_dtype=torch.float32
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stand_in.real, T_max=56)
    for images, labels in batches(epochs=4, rank=dist.get_rank(), ranks=dist.get_world_size()):
        loss = cross_entropy(engine(images), labels)
        engine.backward(loss)
        engine.step()
        schedule.step()
    right = accuracy(model)
    if dist.get_rank() == 0:
        print(f"loss {loss:.4f}, held-out accuracy {right:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
