"""Process-group start-up and rank helpers; everything here is safe when not launched by
torchrun."""

from __future__ import annotations

import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from archscale.errors import ArchscaleError, ConfigError

# What gloo, NCCL and the store say where another rank does not answer any more.
LOST = re.compile(
    r"gloo/.*(closed by peer|reset by peer|Broken pipe|Socket closed|[Tt]imed out|timeout"
    r"|refused|unreachable|No route)|remote process exit|[Tt]imed out after|did not come within"
    r"|wait timeout|failed to recv|Failed to recv|Broken pipe|Connection (reset|refused|was closed)"
    r"|Connection closed|recvValue|socket timed out|client socket has timed out",
    re.DOTALL,
)
Item = TypeVar("Item")
Result = TypeVar("Result")
_timeout: datetime.timedelta | None = None  # of collectives; None: torch's own


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank(group: Any = None) -> int:
    return dist.get_rank(group) if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def launched_world_size() -> int:
    """World size that torchrun announced (1 without it); known before any process group starts.

    Raises:
        ConfigError: WORLD_SIZE announces several processes and nothing says which this one is, or
            one of the variables is no number.
    """
    count = _announced("WORLD_SIZE", 1)
    if count > 1 and not os.environ.get("RANK", "").strip():
        raise ConfigError(
            f"WORLD_SIZE is {count}, and RANK is not set",
            "environment",
            "start with torchrun, which sets both, or unset WORLD_SIZE to train on one process",
        )
    for name in ("RANK", "LOCAL_RANK"):
        if os.environ.get("WORLD_SIZE") and _announced(name, 0) >= count:
            raise ConfigError(
                f"{name} is {os.environ[name]}, with a WORLD_SIZE of {count}",
                "environment",
                "start with torchrun, which sets both",
            )
    return count


def _announced(name: str, otherwise: int) -> int:
    """A number from the environment; an empty one counts as not set, as images of schedulers export
    it."""
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise ConfigError(
            f"{name} is {text!r}, not a number", "environment", "unset it, or start with torchrun"
        )
    return int(text or otherwise)


def may_change_size() -> bool:
    """Whether torchrun may start this job again, and so on another number of nodes."""
    return _announced("TORCHELASTIC_MAX_RESTARTS", 0) > 0


def restarts() -> int:
    """How often torchrun has started this job again after a failure. A node that joins has not seen
    those before it: the most of any rank counts, so all ranks call this together."""
    return int(max(gather_objects(_announced("TORCHELASTIC_RESTART_COUNT", 0))))


def job() -> str:
    """What all processes of this job have in common, also after restarts, and no other job: the
    `--rdzv-id` of torchrun; empty where it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name  # torchrun's own default


def lost_connection(error: BaseException) -> str | None:
    """What an exchange between ranks failed of, in one line, where another rank is gone or cut off;
    None for any other error."""
    text = str(error).partition("\n")[0]
    if not isinstance(error, RuntimeError) or not LOST.search(str(error)):
        return None
    return re.sub(r"^\[[^]]*\] ", "", text).partition(". This is typically caused")[0]


def start(timeout_seconds: float = 600.0) -> torch.device:
    """Join the process group that torchrun announced, if any, and return this process's device.

    NCCL with CUDA, gloo without. A single process without torchrun gets no process group at all,
    also where the environment has a WORLD_SIZE of 1.

    Raises:
        ConfigError: more processes than GPUs, or no address at which several processes meet.
    """
    local_rank = _announced("LOCAL_RANK", 0)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes on a machine with"
                f" {torch.cuda.device_count()} GPUs",
                "--nproc_per_node",
                "start at most one process per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES=",
            )
        torch.cuda.set_device(device)
    needed = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    unset = [name for name in needed if not os.environ.get(name)]
    if unset and launched_world_size() > 1:
        raise ConfigError(
            f"WORLD_SIZE is {launched_world_size()}, and {' and '.join(unset)} not set",
            "environment",
            "start with torchrun, which sets all of them",
        )
    if not unset and not is_distributed():
        global _timeout
        _timeout = datetime.timedelta(seconds=timeout_seconds)
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            number, count = int(os.environ["RANK"]), launched_world_size()
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=_timeout,
                wait_for_workers=False,
            )
            prefix = meet(store, number, count, timeout_seconds)
            shared = dist.PrefixStore(prefix, store)
            dist.init_process_group(
                backend, store=shared, rank=number, world_size=count, timeout=_timeout
            )
        else:
            try:
                dist.init_process_group(backend, timeout=_timeout)
            except dist.DistNetworkError as error:
                if "EADDRINUSE" not in str(error):
                    raise
                port = os.environ["MASTER_PORT"]
                raise ConfigError(
                    f"another process listens at port {port}",
                    "MASTER_PORT",
                    "give a port that is free, or start with torchrun, which chooses one",
                ) from error
    return device


def meet(store: Any, number: int, count: int, timeout_seconds: float) -> str:
    """A prefix for the keys of these ranks that no earlier start of the job has used.

    torchrun keeps one store over all restarts, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is 1, and
    PyTorch tells the starts apart by each node's own count of restarts. A node that is started
    again because another one was does not count that: it would wait where nobody else is, or read
    the addresses of processes that have ended. So rank 0 offers the list of who it sees, each
    by a random number, until all of them have found themselves in the list.

    Raises:
        DistStoreError: some rank did not come.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + timeout_seconds
    here = [f"archscale/here/{n}" for n in range(count)]
    store.set(here[number], mine)
    while time.monotonic() < end:
        offer = []
        if number == 0:
            if store.check(here):
                offer = [store.get(key).decode() for key in here]
                store.set("archscale/offer", json.dumps(offer))
        elif store.check(["archscale/offer"]):
            offer = json.loads(store.get("archscale/offer"))
        if len(offer) == count and offer[number] == mine:
            prefix = f"archscale/{hashlib.sha256(''.join(offer).encode()).hexdigest()[:16]}"
            store.set(f"{prefix}/seen/{number}", "")
            if store.check([f"{prefix}/seen/{n}" for n in range(count)]):
                return prefix
        time.sleep(0.05)
    missing = [n for n, key in enumerate(here) if not store.check([key])]
    names = f"ranks {missing}" if missing else "ranks of an earlier start"
    raise dist.DistStoreError(
        f"{names} did not come within {timeout_seconds:.0f} s (where nodes come and go, torchrun"
        " needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)"
    )


def stop() -> None:
    """Leave the process group; a barrier first, so that no rank tears down sockets that another
    still reads."""
    if is_distributed():
        barrier()
        _host_groups.clear()
        dist.destroy_process_group()


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_reduce(tensor: Tensor, group: Any = None, op: Any = None) -> Tensor:
    """Sum (or `op`) over the group, in place; returns the tensor. A no-op on one process."""
    if is_distributed():
        dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM, group=group)
    return tensor


def from_rank_zero(tensor: Tensor) -> Tensor:
    """Rank 0's values on every rank, in place; returns the tensor."""
    if is_distributed():
        dist.broadcast(tensor, src=0)
    return tensor


class _Done:
    """The work of an exchange with nobody."""

    def wait(self) -> None:
        pass


def all_to_all(
    send: Tensor, sends: list[int], receives: list[int], group: Any = None
) -> tuple[Tensor, Any]:
    """Start one packed all-to-all of a flat tensor; returns (received, work), to be waited for.

    Args:
        sends, receives: elements to and from each rank of the group.
    """
    received = send.new_empty(sum(receives))
    if len(sends) == 1:
        return received, _Done()
    # As bytes: gloo does not know every dtype.
    size = send.element_size()
    work = dist.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        [n * size for n in receives],
        [n * size for n in sends],
        group=group,
        async_op=True,
    )
    return received, work


class Ballot:
    """Questions to every rank whose largest answer all ranks get, between hosts: nobody waits for a
    device. In a group of its own, so that the exchange does not queue behind those of a step.

    Args:
        questions: each gives this rank's answer, from 0 to 255.
    """

    def __init__(self, *questions: Callable[[], int]):
        self._questions = questions
        self._answers = torch.zeros(len(questions), dtype=torch.uint8)
        self._group = _host_group()
        self._work: Any = None

    def begin(self) -> None:
        """Ask; all ranks together."""
        for i, question in enumerate(self._questions):
            self._answers[i] = question()
        if self._group is not None:
            self._work = dist.all_reduce(
                self._answers, op=dist.ReduceOp.MAX, group=self._group, async_op=True
            )

    def end(self) -> list[int]:
        """The largest answer to each question, once every rank has begun."""
        if self._work is not None:
            self._work.wait()
        return self._answers.tolist()

    def ask(self) -> list[int]:
        self.begin()
        return self.end()


_host_groups: dict[Any, Any] = {}  # by the default group; at most one


def _host_group() -> Any:
    """A gloo group of all ranks beside the default one, made once; None on one process."""
    if world_size() == 1:
        return None
    if dist.group.WORLD not in _host_groups:
        _host_groups.clear()
        _host_groups[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=_timeout)
    return _host_groups[dist.group.WORLD]


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank_zero(fn: Callable[[], Any]) -> Any:
    """Run `fn` on rank 0 and return its result on every rank; its exception is raised on every
    rank."""
    result: list[Any] = [None, None]
    if rank() == 0:
        try:
            result[0] = fn()
        except (
            Exception
        ) as error:  # carried to every rank: one that raised alone would leave the others waiting
            result[1] = portable(error)
    if is_distributed():
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise same_everywhere(result[1])
    return result[0]


def portable(error: Exception | None) -> Exception | None:
    """The error, or its text where it would not survive pickling (and would leave the other ranks
    waiting)."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def same_everywhere(error: Exception) -> Exception:
    """Marks an error that every rank raises, so that one of them reports it.

    The barrier lets every rank hear of it before the first one exits and closes its sockets.
    """
    barrier()
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


def agree(fn: Callable[[], Any], failures: type[Exception] = Exception) -> Any:
    """Run `fn` on every rank; if it fails on any, the first failure is raised on all of them.

    Args:
        failures: that are raised on all. Any other is raised at once where it happens.
    """
    result, error = None, None
    try:
        result = fn()
    except failures as caught:  # raised below, on every rank together
        error = portable(caught)
    for failure in gather_objects(error):
        if failure is not None:
            raise same_everywhere(failure)
    return result


def shared_out(items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
    """`work` of every item, on every rank, in order; each rank does every n-th item of n ranks.

    All ranks work equally often, so that collectives in `work` line up: where nothing is left for a
    rank, it does the first item again. An `ArchscaleError` on any rank is raised on all after that
    item, before any of them begins the next. Another failure may come from within a collective,
    where the others still wait: it ends the rank at once, and so the job.
    """
    mine = range(rank(), len(items), world_size())
    rounds = -(-len(items) // world_size())
    results: list[Result] = []
    for n in range(rounds):
        item = items[mine[n] if n < len(mine) else 0]
        results.append(agree(functools.partial(work, item), ArchscaleError))
    parts = gather_objects(results)
    return [parts[number % len(parts)][number // len(parts)] for number in range(len(items))]


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this rank stores (shares memory)."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shard_rows(tensor: Tensor) -> Tensor:
    """`tensor`, the same on every rank, as a DTensor with its rows chunked over all ranks; itself
    on one process."""
    if not is_distributed():
        return tensor
    mesh = init_device_mesh(tensor.device.type, (world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


@dataclass(frozen=True)
class Piece:
    """Equally spaced runs of a row-major flattened tensor: `count` runs of `length` elements, the
    first at `start`, each `stride` after the one before. An interval is one run."""

    start: int
    length: int
    stride: int = 0
    count: int = 1

    @property
    def numel(self) -> int:
        return self.length * self.count


def local_pieces(tensor: Tensor) -> list[Piece]:
    """What this rank stores of the row-major flattened whole tensor, in the order in which it
    stores it.

    A plain tensor is stored whole. A DTensor stores a box: its rows under `Shard(0)` (one
    interval), a piece of each row under `Shard(1)` (equally spaced runs), both on a 2-D mesh.
    Dimensions are chunked by ceiling, so the last ranks can be short or empty. Where FSDP2 shards a
    dimension that tensor or expert parallelism has sharded before, its placement stands first and
    applies last (`_StridedShard`).

    Raises:
        ValueError: a placement other than these and `Replicate`.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return [Piece(0, tensor.numel())] if tensor.numel() else []
    coordinate = tensor.device_mesh.get_coordinate()  # a permuted mesh orders ranks otherwise
    if coordinate is None:
        return []
    box = [(0, size) for size in shape]
    for mesh_dim in _cutting_order(tensor):
        placement: Any = tensor.placements[mesh_dim]
        dim, ways = placement.dim, tensor.device_mesh.size(mesh_dim)
        low, high = box[dim]
        chunk = -(-(high - low) // ways)
        start = min(low + chunk * coordinate[mesh_dim], high)
        box[dim] = start, min(start + chunk, high)
    return box_pieces(shape, box)


def _cutting_order(tensor: DTensor) -> list[int]:
    """Mesh dimensions that shard the tensor, in the order in which they cut it."""
    mesh = tensor.device_mesh
    placements: tuple[Any, ...] = tensor.placements
    plain, last = [], []
    for mesh_dim, placement in enumerate(placements):
        if type(placement) is Shard:
            plain.append(mesh_dim)
        elif isinstance(placement, _StridedShard):
            inner = [
                mesh.size(d)
                for d in range(mesh_dim + 1, mesh.ndim)
                if type(placements[d]) is Shard and placements[d].dim == placement.dim
            ]
            if placement.split_factor != math.prod(inner):
                raise ValueError(f"placement {placement} is not one that FSDP2 makes")
            last.append(mesh_dim)
        elif not isinstance(placement, Replicate):
            raise ValueError(f"placement {placement} is not supported: use Replicate and Shard")
    return plain + last


def box_pieces(shape: Sequence[int], box: Sequence[tuple[int, int]]) -> list[Piece]:
    """The box [low, high) by dimension of a row-major flattened `shape`; nothing where it is
    empty."""
    if any(low >= high for low, high in box):
        return []
    cut = [d for d, size in enumerate(shape) if box[d] != (0, size)]
    if not cut:
        return [Piece(0, math.prod(shape))]
    # Elements of one index of dimension d.
    sizes = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    inner, outer = cut[-1], cut[-2] if len(cut) > 1 else None
    length, stride = (box[inner][1] - box[inner][0]) * sizes[inner], shape[inner] * sizes[inner]
    start = box[inner][0] * sizes[inner]
    if outer is None:
        return [Piece(start, length, stride, math.prod(shape[:inner]))]
    low, high = box[outer]
    count = (high - low) * math.prod(shape[outer + 1 : inner])
    # Each is a piece of its own.
    before = itertools.product(*(range(*box[d]) for d in range(outer)))
    return [
        Piece(
            start + low * sizes[outer] + sum(i * sizes[d] for d, i in enumerate(index)),
            length,
            stride,
            count,
        )
        for index in before
    ]


def local_interval(tensor: Tensor) -> tuple[int, int]:
    """[lo, hi) of the row-major flattened whole tensor, where this rank stores one interval of it.

    Raises:
        ValueError: it stores pieces of rows.
    """
    pieces = local_pieces(tensor)
    if not pieces:
        return 0, 0
    if len(pieces) > 1 or pieces[0].count > 1:
        raise ValueError("it is sharded within its rows: use Replicate and Shard(0)")
    return pieces[0].start, pieces[0].start + pieces[0].length


def laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`other` with the placements of `tensor`, where both are DTensors."""
    if (
        isinstance(tensor, DTensor)
        and isinstance(other, DTensor)
        and other.placements != tensor.placements
    ):
        return other.redistribute(placements=tensor.placements)
    return other


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a value of the same shape into `tensor`, in its dtype and on its device. A whole value
    fills this rank's part of a DTensor; a DTensor is gathered for a plain tensor, by all ranks
    together."""
    value = laid_out_as(tensor, value)
    if isinstance(value, DTensor) and not isinstance(tensor, DTensor):
        value = value.full_tensor()
    if not isinstance(tensor, DTensor) or isinstance(value, DTensor):
        local_tensor(tensor).copy_(local_tensor(value))
        return
    flat, local, at = value.contiguous().view(-1), local_tensor(tensor).view(-1), 0
    for piece in local_pieces(tensor):
        runs = flat[piece.start :].as_strided((piece.count, piece.length), (piece.stride, 1))
        local[at : at + piece.numel].copy_(runs.reshape(-1))
        at += piece.numel


@dataclass(frozen=True)
class Fragment:
    """What this rank stores of a tensor of `shape`: elements [lo, lo + len(data)) of its row-major
    flattening.

    Attributes:
        data: 1-D, in the memory of the tensor itself.
    """

    shape: tuple[int, ...]
    lo: int
    data: Tensor


def fragment(tensor: Tensor) -> Fragment:
    """What this rank holds of a plain tensor or a DTensor."""
    return Fragment(
        tuple(tensor.shape), local_interval(tensor)[0], local_tensor(tensor).detach().view(-1)
    )
