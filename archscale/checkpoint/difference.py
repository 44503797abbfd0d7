"""Two checkpoints compared, tensor by tensor, whatever layouts and how many processes wrote them.

At any time one tensor of each is in memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from archscale.checkpoint.directory import read_state
from archscale.checkpoint.history import other_trajectory
from archscale.checkpoint.place import Place
from archscale.checkpoint.reading import EMA, WEIGHTS
from archscale.checkpoint.writer import reader_of
from archscale.config.layers import flatten
from archscale.errors import CheckpointError, explain_os_error, show
from archscale.terminal import table

BLOCK = 1 << 20  # elements that are compared at once, in float64
# Entries of state.json that differ between checkpoints of equal content.
OWN = (
    *("format", "crc32", "files", "world_size", "config"),
    *("id", "parent", "resumed", "changes", "averaged"),
)
MISSING = "not there"


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors of one name and shape.

    Attributes:
        different: elements whose bits differ, of `elements`.
        absolute: largest |a − b|.
        relative: largest |a − b| / max(|a|, |b|).
        norm: ‖a − b‖ / ‖a‖.
        distance, magnitude: ‖a − b‖ and ‖a‖; all five over the elements finite in both.
        not_finite: elements of the different ones that are not finite in one of them or both.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    different: int
    absolute: float
    relative: float
    norm: float
    distance: float
    magnitude: float
    not_finite: int


@dataclass(frozen=True)
class Difference:
    """What differs between the checkpoints `first` and `second`.

    Attributes:
        config: by dotted key the two values.
        another_trajectory: those of these keys with which one cannot be resumed as the other.
        state: everything else in state.json by dotted key: step, data, guard; not what the
            checkpoint is called, where it comes from and who wrote it.
        equal: number of tensors whose bits are the same.
        tensors: that differ.
        parts: ‖a − b‖ / ‖a‖ over all weights (`weights`), and over all that the optimizer holds
            under one name, such as `momentum`.
        mismatched: by tensor why it cannot be compared: only in one, or another shape or dtype.
    """

    first: str
    second: str
    config: dict[str, tuple[Any, Any]]
    another_trajectory: list[str]
    state: dict[str, tuple[Any, Any]]
    equal: int
    tensors: list[TensorDifference]
    parts: dict[str, float]
    mismatched: dict[str, str]

    @property
    def same(self) -> bool:
        """Whether both have the same step, data, state and tensors, bit for bit."""
        return not (self.state or self.tensors or self.mismatched)

    @property
    def verdict(self) -> str:
        """One line."""
        unequal = len(self.tensors) + len(self.mismatched)
        if unequal:
            worst = max(self.tensors, key=lambda tensor: tensor.norm, default=None)
            most = "" if worst is None else f", most in {worst.name} ({worst.norm:.2g} of its norm)"
            return f"different: {unequal} of {unequal + self.equal} tensors{most}"
        if self.state:
            return f"different: {', '.join(self.state)}; bitwise equal: {self.equal} tensors"
        return f"bitwise equal: {self.equal} tensors"

    @property
    def first_problem(self) -> str | None:
        """The first thing that differs, with its values; None where both are the same."""
        for name, reason in self.mismatched.items():
            return f"tensor {name}: {reason}"
        for tensor in self.tensors:
            return (
                f"tensor {tensor.name}: {tensor.different:,} of {tensor.elements:,} elements, by up"
                f" to {tensor.absolute:.3g}, {tensor.norm:.2g} of its norm"
            )
        for key, (a, b) in self.state.items():
            return f"{key}: {show(a)} and {show(b)}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "same": self.same, "verdict": self.verdict}

    def render(self) -> str:
        """For people; the last line is the verdict."""
        lines = [f"A  {self.first}", f"B  {self.second}", ""]
        for title, values in (("config", self.config), ("state", self.state)):
            for key, (a, b) in values.items():
                note = ", another trajectory" if key in self.another_trajectory else ""
                lines.append(f"{title} {key}: {show(a)} in A, {show(b)} in B{note}")
        lines += [f"tensor {name}: {reason}" for name, reason in self.mismatched.items()]
        if self.tensors:
            head = ["tensor", "shape", "elements that differ", "largest |a-b|"]
            rows = [[*head, "largest |a-b|/max(|a|,|b|)", "||a-b||/||a||", "not finite"]]
            rows += [
                [
                    tensor.name,
                    "x".join(map(str, tensor.shape)) or "scalar",
                    f"{tensor.different:,} of {tensor.elements:,}",
                    *(f"{v:.3g}" for v in (tensor.absolute, tensor.relative, tensor.norm)),
                    f"{tensor.not_finite:,}" if tensor.not_finite else "",
                ]
                for tensor in self.tensors
            ]
            lines += table(rows)
        return "\n".join([*lines, self.verdict])


class TensorReader:
    """The tensors of a checkpoint, read whole, one at a time.

    Raises:
        CheckpointError: it cannot be read; also by `read`.
    """

    def __init__(self, path: Place):
        self._path, self._reader = path, reader_of(path)
        with _explained(path, ".metadata"):
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        entry = self.tensors[name]
        with _explained(self._path, name):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            planner = DefaultLoadPlanner()
            planner.set_up_planner({name: tensor}, self._metadata, is_coordinator=True)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(planner.finish_plan(plan), planner).wait()
        return tensor


@contextlib.contextmanager
def _explained(path: Place, part: str) -> Iterator[None]:
    """Makes an error of reading `part` of a checkpoint one that names both."""
    try:
        yield
    except (CheckpointException, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if isinstance(error, OSError):
            cause, _ = explain_os_error(error, "")
        raise CheckpointError(
            f"cannot read {part}: {cause}",
            str(path),
            "see what is damaged with `archscale checkpoint verify`",
        ) from error


def compare_checkpoints(first: Place, second: Place) -> Difference:
    """Compare two checkpoints bit by bit.

    Raises:
        CheckpointError: one of them is none, or cannot be read.
    """
    states = read_state(first), read_state(second)
    configs = [flatten({**state["config"], "data_set": state["data"]}) for state in states]
    rest = [flatten({k: v for k, v in state.items() if k not in OWN}) for state in states]
    readers = TensorReader(first), TensorReader(second)
    config = _different_keys(*(flatten(state["config"]) for state in states))
    mismatched = dict(_mismatched(*(reader.tensors for reader in readers)))
    compared = []
    for name in sorted(readers[0].tensors.keys() - mismatched.keys()):
        compared.append(compare_tensors(name, *(reader.read(name) for reader in readers)))
    return Difference(
        str(first),
        str(second),
        config,
        [key for key in other_trajectory(*configs) if key in config],
        _different_keys(*rest),
        sum(not tensor.different for tensor in compared),
        [tensor for tensor in compared if tensor.different],
        _parts(compared),
        mismatched,
    )


def _parts(compared: Sequence[TensorDifference]) -> dict[str, float]:
    squares: dict[str, tuple[float, float]] = {}
    for tensor in compared:
        part = tensor.name.rpartition(".")[2]
        for start, name in ((WEIGHTS, "weights"), (EMA, "running average")):
            part = name if tensor.name.startswith(start) else part
        gap, whole = squares.get(part, (0.0, 0.0))
        squares[part] = gap + tensor.distance**2, whole + tensor.magnitude**2
    return {part: _share(gap**0.5, whole**0.5) for part, (gap, whole) in squares.items()}


def _share(distance: float, magnitude: float) -> float:
    """The distance over the magnitude; 1 where all of it is new."""
    return distance / magnitude if magnitude else float(distance > 0)


def _different_keys(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    keys = sorted(first.keys() | second.keys())
    pairs = {key: (first.get(key, MISSING), second.get(key, MISSING)) for key in keys}
    return {key: pair for key, pair in pairs.items() if _text(pair[0]) != _text(pair[1])}


def _text(value: Any) -> str:
    """JSON: NaN equals itself there, and 1 is not True."""
    return json.dumps(value, sort_keys=True)


def _mismatched(
    first: Mapping[str, TensorStorageMetadata], second: Mapping[str, TensorStorageMetadata]
) -> Iterator[tuple[str, str]]:
    for name in sorted(first.keys() | second.keys()):
        if name not in second:
            yield name, "only in A"
        elif name not in first:
            yield name, "only in B"
        elif first[name].size != second[name].size:
            yield name, f"{list(first[name].size)} in A, {list(second[name].size)} in B"
        elif first[name].properties.dtype != second[name].properties.dtype:
            a, b = first[name].properties.dtype, second[name].properties.dtype
            yield name, f"{a} in A, {b} in B".replace("torch.", "")


def compare_tensors(name: str, first: Tensor, second: Tensor) -> TensorDifference:
    """How two tensors of one shape and dtype differ."""
    flat = first.reshape(-1), second.reshape(-1)
    different = not_finite = 0
    absolute = relative = squares = whole = 0.0
    for begin in range(0, first.numel(), BLOCK):
        a, b = (tensor[begin : begin + BLOCK] for tensor in flat)
        # As bytes: NaN equals itself, and 0 is not −0.
        changed = (a.view(torch.uint8) != b.view(torch.uint8)).view(len(a), -1).any(dim=1)
        a, b = a.double(), b.double()
        finite = a.isfinite() & b.isfinite()
        different += int(changed.sum())
        not_finite += int((changed & ~finite).sum())
        whole += float(a[finite].square().sum())
        a, b = a[changed & finite], b[changed & finite]
        if len(a):
            gap = (a - b).abs()
            absolute = max(absolute, float(gap.max()))
            # 0 and −0 are no distance apart.
            largest = torch.maximum(a.abs(), b.abs()).clamp_min(torch.finfo(torch.double).tiny)
            relative = max(relative, float((gap / largest).max()))
            squares += float(gap.square().sum())
    distance, magnitude = squares**0.5, whole**0.5
    return TensorDifference(
        name,
        tuple(first.shape),
        first.numel(),
        different,
        absolute,
        relative,
        _share(distance, magnitude),
        distance,
        magnitude,
        not_finite,
    )
