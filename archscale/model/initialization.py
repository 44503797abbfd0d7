"""How the parameters of a model are drawn, on any device and under any sharding.

A parameter is drawn in chunks, each by a generator of its own, so that a rank draws only the chunks
of which it holds a part, and threads can draw at the same time: PyTorch gives up Python's lock
while it fills a tensor.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from archscale.distributed import Fragment, fragment

# Elements that one generator draws. Part of the definition of a run: another value draws other
# weights.
CHUNK = 1 << 18
# Chunks that are drawn ahead, by thread: enough to keep threads busy over many small parameters,
# and a bound on what waits in host memory where the weights live elsewhere.
AHEAD = 16


@torch.no_grad()
def initialize(
    model: nn.Module,
    seed: int,
    weights: Mapping[str, Fragment] | None = None,
    *,
    threads: int | None = None,
) -> None:
    """Fill every parameter of `model` (plain tensors or DTensors, on any device) as its module's
    `parameter_roles` say.

    Every element is a function of (seed, parameter name, position), so the weights depend neither
    on how they are sharded nor on the number of threads.

    Args:
        weights: what to fill instead, by parameter name, where an engine keeps the weights
            elsewhere.
        threads: that draw; None: this process's share of the processor.

    Raises:
        ValueError: a parameter without `init`.
    """
    threads = threads or share_of_cores()
    waiting: deque[_Drawing] = deque()
    ahead = 0  # chunks of those that wait
    with ThreadPoolExecutor(threads) as pool:
        for name, parameter, init in _initializations(model):
            held = fragment(parameter) if weights is None else weights[name]
            waiting.append(_Drawing(pool, held, *init, seed=seed, name=name))
            ahead += waiting[-1].chunks
            while ahead > AHEAD * threads:
                ahead -= waiting[0].chunks
                waiting.popleft().finish()
        for drawing in waiting:
            drawing.finish()


def share_of_cores() -> int:
    """Processor cores that this process may use, where a node's processes share them equally."""
    # Not PyTorch's number of threads: torchrun sets that to 1, while nothing else runs here yet.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _initializations(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[str, float]]]:
    """Name, parameter and (distribution, scale) of each parameter of `model`, once."""
    done: set[int] = set()
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:  # a tied weight is drawn where it is first registered
                continue
            done.add(id(parameter))
            name = f"{prefix}.{key}" if prefix else key
            spec = getattr(module, "parameter_roles", {}).get(key, {})
            if "init" not in spec:
                raise ValueError(
                    f"parameter {name!r} has no initialization: add 'init' to its module's"
                    " parameter_roles"
                )
            yield name, parameter, spec["init"]


class _Drawing:
    """The elements of one parameter that a rank holds, while threads of `pool` draw them.

    Attributes:
        chunks: of which it holds a part.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        held: Fragment,
        distribution: str,
        scale: float,
        *,
        seed: int,
        name: str,
    ):
        self._target = held.data
        # Without a copy where the generators can write into the weights themselves.
        here = held.data.device.type == "cpu" and held.data.dtype == torch.float32
        self._values = held.data if here else torch.empty(held.data.shape)
        # Parts of chunks, by where they go. This thread copies them: PyTorch would start threads
        # of its own for the copy in each thread of the pool.
        self._parts: list[tuple[Tensor, Future[Tensor]]] = []
        self._whole: list[Future[Tensor]] = []
        lo, hi, numel = held.lo, held.lo + held.data.numel(), math.prod(held.shape)
        if distribution == "constant":
            self.chunks = 0
            self._values.fill_(scale)
            return
        draw = _distribution(distribution, scale, name)
        chunks = range(lo // CHUNK, -(-hi // CHUNK))
        self.chunks = len(chunks)
        for chunk in chunks:
            key = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=8).digest()
            number = int.from_bytes(key, "little", signed=True)
            start, end = chunk * CHUNK, min((chunk + 1) * CHUNK, numel)
            a, b = max(lo, start), min(hi, end)
            target = self._values[a - lo : b - lo]
            if (a, b) == (start, end):
                self._whole.append(pool.submit(draw, target, number))
            else:
                # The whole chunk, because its later elements depend on the earlier.
                drawn = pool.submit(_drawn_part, draw, end - start, number, a - start, b - start)
                self._parts.append((target, drawn))

    def finish(self) -> None:
        """Wait until everything is drawn, and in its place."""
        for drawn in self._whole:
            drawn.result()
        for target, drawn in self._parts:
            target.copy_(drawn.result())
        if self._values is not self._target:
            self._target.copy_(self._values)


def _distribution(distribution: str, scale: float, name: str) -> Callable[[Tensor, int], Tensor]:
    """Fills a whole chunk from a generator of the given seed: `uniform` on (−scale, scale), or
    `normal` with standard deviation `scale`. On the CPU whatever the weights' device, because a
    GPU's generator draws other numbers."""

    @torch.no_grad()  # which counts for one thread
    def uniform(chunk: Tensor, seed: int) -> Tensor:
        return chunk.uniform_(-scale, scale, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def normal(chunk: Tensor, seed: int) -> Tensor:
        return chunk.normal_(0.0, scale, generator=torch.Generator().manual_seed(seed))

    draws = {"uniform": uniform, "normal": normal}
    if distribution not in draws:
        raise ValueError(f"unknown distribution {distribution!r} of parameter {name!r}")
    return draws[distribution]


def _drawn_part(
    draw: Callable[[Tensor, int], Tensor], size: int, seed: int, first: int, end: int
) -> Tensor:
    """Elements [first, end) of a chunk of `size` elements."""
    return draw(torch.empty(size), seed)[first:end]
