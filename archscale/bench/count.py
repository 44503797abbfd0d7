"""What a piece of work would launch on an accelerator, counted on tensors without storage: kernels,
the bytes that they read and write, and collectives.

A launch is one operator that PyTorch dispatches; views and allocations launch nothing. Its bytes
are each distinct operand once, as it is seen (expanded dimensions once), and each result once: no
cache helps, and nothing is read twice. A compiled region counts as one launch, which reads what
comes from outside and writes what outlives it; what a compiler recomputes instead of keeping is not
known here.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from archscale import distributed
from archscale.distributed import Piece

FREE = {  # launch nothing, beside views
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "is_same_size",
    "lift_fresh",
    "promote_types",
    "scalar_tensor",  # stays on the host
}
WRITE_ONLY = {"copy_", "fill_", "zero_"}  # read nothing of what they overwrite
COMPILED = "_TorchDynamoContext.__call__.<locals>.compile_wrapper"  # the frame around a region

Places = Mapping[tuple[str, str], str]
"""(module, qualified name of a function) → what a step does there."""


@dataclass
class Tally:
    """What has been counted of one part of a step."""

    bytes: int = 0
    operators: Counter[str] = field(default_factory=Counter)  # launches by operator

    @property
    def launches(self) -> int:
        return self.operators.total()


class _Region:
    """A compiled region while it runs."""

    def __init__(self, part: str):
        self.part = part
        self._outside: dict[tuple, int] = {}  # operands → bytes
        self._inside: dict[int, tuple[StorageWeakRef, int]] = {}  # storage → bytes
        self.launches = False

    def add(
        self, read: Sequence[Tensor], changed: Sequence[Tensor], made: Sequence[Tensor]
    ) -> None:
        """One operator: what it reads, changes in place, and makes."""
        for kind, tensors in (("read", read), ("changed", changed)):
            for tensor in tensors:
                if tensor.untyped_storage()._cdata not in self._inside:
                    self._outside[(kind, *_identity(tensor))] = _size(tensor)
        for tensor in made:
            storage = tensor.untyped_storage()
            self._inside[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def bytes(self) -> int:
        """Read from outside, and written to what is still there."""
        left = sum(size for reference, size in self._inside.values() if not reference.expired())
        return sum(self._outside.values()) + left


class LaunchCounter(TorchDispatchMode):
    """Counts what is dispatched within it.

    Args:
        places: parts by the function in which an operator is called; the innermost counts.

    Attributes:
        tallies: by part; what is called in none of the places counts for the part that `part`
            names.
    """

    def __init__(self, places: Places):
        super().__init__()
        self.tallies: dict[str, Tally] = {}
        self._places = places
        self._part = "rest"
        self._region: _Region | None = None
        self._frame: FrameType | None = None  # around the region, where it is called from Python

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count for the part `name` what is called in none of the places."""
        before, self._part = self._part, name
        with self:
            yield
        self.end_region()
        self._part = before

    @contextlib.contextmanager
    def region(self, part: str) -> Iterator[None]:
        """What is within is one region of `part`."""
        self.begin_region(part)
        yield
        self.end_region()

    def begin_region(self, part: str) -> None:
        """What follows is one compiled region of `part`, until another begins or `end_region`."""
        self.end_region()
        self._region = _Region(part)

    def end_region(self) -> None:
        region, self._region, self._frame = self._region, None, None
        if region is not None and region.launches:
            self._add(region.part, "compiled region", region.bytes())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or func.namespace == "prim":
            return result
        part, frame = self._place()
        if frame is not self._frame:
            self.end_region()
            if frame is not None:
                self.begin_region(part)
                self._frame = frame
        free = name in FREE
        operands = _tensors((args, kwargs | {"out": None}))
        read = [] if free else operands[1:] if name in WRITE_ONLY else operands
        # The first argument is a tensor, or a list of them; `out` is given and returned.
        changed = _tensors(args[0] if name.endswith("_") else kwargs.get("out"))
        old = {tensor.untyped_storage()._cdata for tensor in operands + changed}
        made = [t for t in _tensors(result) if t.untyped_storage()._cdata not in old]
        if self._region is not None:
            self._region.launches |= not free
            self._region.add(read, changed, made)
        elif not free:
            self._add(part, name, _total(read) + _total(changed) + _total(made))
        return result

    def _add(self, part: str, name: str, size: int) -> None:
        tally = self.tallies.setdefault(part, Tally())
        tally.bytes += size
        tally.operators[name] += 1

    def _place(self) -> tuple[str, FrameType | None]:
        """The part that the present operator belongs to, and the frame around the outermost
        compiled region that it is called in."""
        part, compiled = None, None
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            qualified = frame.f_code.co_qualname
            if part is None:
                function = qualified.split(".<locals>")[0]
                part = self._places.get((frame.f_globals.get("__name__", ""), function))
            if qualified == COMPILED:
                compiled = frame
            frame = frame.f_back
        held = self._region is not None and self._frame is None
        return part or self._part, None if held else compiled


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _identity(tensor: Tensor) -> tuple:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()


def _total(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, each once."""
    return sum({_identity(t): _size(t) for t in tensors}.values())


def _size(tensor: Tensor) -> int:
    """Bytes of its distinct elements."""
    dims = zip(tensor.shape, tensor.stride())
    return math.prod(size for size, stride in dims if stride) * tensor.element_size()


@dataclass
class CountedGroup:
    """Stands for the process group of rank 0 of `world` ranks: collectives do nothing and are
    counted. Parameters are sharded by rows over `shard` of them, replicas over the others.

    Attributes:
        calls: by collective, how often it is called, and the bytes that rank 0 gives to others
            (all-to-all) or to the sum (all-reduce).
    """

    world: int
    shard: int
    calls: dict[str, tuple[int, int]] = field(default_factory=dict)

    def held(self, shape: Sequence[int], rank: int) -> Piece:
        """What a rank holds of a parameter: chunks by ceiling, as FSDP2 has them."""
        chunk = -(-shape[0] // self.shard)
        low = min(rank % self.shard * chunk, shape[0])
        row = math.prod(shape[1:])
        return Piece(low * row, (min(low + chunk, shape[0]) - low) * row)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it this process is rank 0."""
        if self.world == 1:
            yield
            return
        stand_ins: dict[str, Any] = {
            "is_initialized": lambda: True,
            "get_rank": lambda *_: 0,
            "get_world_size": lambda *_: self.world,
            "all_reduce": self._all_reduce,
            "all_to_all_single": self._all_to_all,
            "all_gather_object": self._gather,
        }
        with mock.patch.multiple(distributed.dist, **stand_ins):
            yield

    def _count(self, name: str, size: int) -> None:
        calls, total = self.calls.get(name, (0, 0))
        self.calls[name] = calls + 1, total + size

    def _all_reduce(self, tensor: Tensor, **_: Any) -> None:
        self._count("all-reduce", tensor.nbytes)

    def _all_to_all(
        self, received: Tensor, sent: Tensor, receives: list[int], sends: list[int], **_: Any
    ) -> mock.Mock:
        self._count("all-to-all", sum(sends))
        return mock.Mock()  # the work, to be waited for

    def _gather(self, values: list[Any], own: Any, **_: Any) -> None:
        """Every rank describes the parameters as rank 0 does, but for the pieces that it holds."""
        for rank in range(self.world):
            pieces = [[self.held(entry.shape, rank)] for entry in own.descriptions]
            values[rank] = type(own)(own.error, own.descriptions, pieces, own.in_the_way)
