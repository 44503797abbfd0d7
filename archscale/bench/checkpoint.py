"""`archscale bench checkpoint`: ours, asynchronous and in the foreground, beside `torch.save`,
`dcp.save` and `dcp.async_save`, all of them until the bytes are on the disk.

Two states: a config's model with its optimizer, between real training steps on random tokens; and
one of a given size, half weights and half momentum, where the step is computed: six FLOPs a
parameter and token at the machine's matmul rate, a lower bound. Arms alternate in rounds in
shuffled order, each time in a process of its own, which saves twice and loads once. Measured of
each:

    stall        seconds for which `save` holds training up, and their share of a step: of the
                 second save, and of the first, which touches its memory for the first time
    slower       how much longer steps take while the save is under way (both use the same cores)
    save, load   seconds until all is on the disk, and from a cold page cache back into the tensors;
                 beside a plain write with fsync, and a plain cold read, of the same bytes in the
                 same process
    memory       most private memory above the most that training alone takes, in units of the state
                 (`RssAnon` of Linux); pages of files do not count
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from archscale.bench.data import private_memory
from archscale.bench.table import Row, markdown
from archscale.bench.timing import machine, matmul_rate
from archscale.bench.workload import Workload, plan_one_process
from archscale.checkpoint.saving import Saver, load_checkpoint
from archscale.config import CheckpointConfig, Config
from archscale.distributed import Fragment
from archscale.errors import ConfigError
from archscale.files import step_directory

_LIMIT = 1200  # seconds that one process may take
_STEPS = 7  # that the time of a step is taken from
_COLUMNS = 4096  # of the matrices of a state of a given size
_MATMUL_ROWS = 1024


class State(NamedTuple):
    """What is saved.

    Attributes:
        optimizer: of the weights, or what has `fragments` as one has.
        step: trains once; None where a step is only computed.
        step_seconds: of one step without a save.
    """

    weights: dict[str, Fragment]
    optimizer: Any
    step: Callable[[], Any] | None
    step_seconds: float

    def tensors(self) -> dict[str, Tensor]:
        """All of it under the names that a checkpoint has."""
        entries: dict[str, Any] = {f"model.{name}": value for name, value in self.weights.items()}
        for name, state in self.optimizer.fragments().items():
            entries |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        return {
            name: value.data.view(value.shape) if isinstance(value, Fragment) else value
            for name, value in entries.items()
        }


class _Momenta:
    """As much of an optimizer as saving needs: one momentum a weight."""

    def __init__(self, weights: Mapping[str, Fragment]):
        self._held = {
            name: {"momentum": Fragment(part.shape, 0, torch.ones_like(part.data))}
            for name, part in weights.items()
        }

    def fragments(self) -> dict[str, dict[str, Fragment]]:
        return self._held


def sized_state(size: int, batch_tokens: int) -> State:
    """A state of about `size` bytes."""
    rows = 1024
    count = max(1, round(size / 2 / (4 * rows * _COLUMNS)))
    weights = {
        f"blocks.{i}.weight": Fragment((rows, _COLUMNS), 0, torch.randn(rows * _COLUMNS))
        for i in range(count)
    }
    flops = 6.0 * count * rows * _COLUMNS * batch_tokens
    rate = max(matmul_rate(_MATMUL_ROWS, torch.float32, torch.device("cpu")) for _ in range(3))
    return State(weights, _Momenta(weights), None, flops / rate)


def trained_state(values: dict[str, Any]) -> State:
    """A config's model and optimizer after a few steps, whose median time it has."""
    work = Workload(values, torch.device("cpu"))
    seconds = []
    for _ in range(_STEPS + 1):
        began = time.perf_counter()
        work.step()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[1:])
    return State(work.engine.weights(), work.optimizer, work.step, median)


# --- the arms: each begins a save, says when it is on the disk, and loads


class Arm(NamedTuple):
    """Attributes:
    begin: starts saving a state into a folder; returns what waits until that is on the disk.
    load: the folder back into the state's tensors.
    """

    label: str
    begin: Callable[[State, Path], Callable[[], Any]]
    load: Callable[[State, Path], Any]


_savers: dict[bool, Saver] = {}  # of this process, by whether they are asynchronous


def _begin_ours(asynchronous: bool) -> Callable[[State, Path], Callable[[], Any]]:
    def begin(state: State, folder: Path) -> Callable[[], Any]:
        if asynchronous not in _savers:
            _savers[asynchronous] = Saver(
                folder, CheckpointConfig.model_validate({"async": asynchronous})
            )
        _savers[asynchronous].save(state.weights, state.optimizer, {"step": 1})
        return _savers[asynchronous].wait

    return begin


def _load_ours(state: State, folder: Path) -> None:
    load_checkpoint(step_directory(folder, 1), state.weights, state.optimizer)


def _begin_torch(state: State, folder: Path) -> Callable[[], Any]:
    with open(folder / "state.pt", "wb") as file:
        torch.save(state.tensors(), file)
        file.flush()
        os.fsync(file.fileno())
    return lambda: None


def _load_torch(state: State, folder: Path) -> None:
    loaded, tensors = torch.load(folder / "state.pt"), state.tensors()
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])


def _begin_dcp(state: State, folder: Path) -> Callable[[], Any]:
    dcp.save(state.tensors(), checkpoint_id=folder / "dcp")
    return lambda: None


def _begin_dcp_async(state: State, folder: Path) -> Callable[[], Any]:
    if not dist.is_initialized():  # it needs a group, also on one process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    future: Any = dcp.async_save(state.tensors(), checkpoint_id=folder / "dcp")
    return future.result


def _load_dcp(state: State, folder: Path) -> None:
    dcp.load(state.tensors(), checkpoint_id=folder / "dcp")


ARMS = [
    Arm("ours, asynchronous", _begin_ours(True), _load_ours),
    Arm("ours, foreground", _begin_ours(False), _load_ours),
    Arm("torch.save", _begin_torch, _load_torch),
    Arm("dcp.save", _begin_dcp, _load_dcp),
    Arm("dcp.async_save", _begin_dcp_async, _load_dcp),
]


# --- measuring one arm in a process of its own


def measure(label: str, make: Callable[[], State], folder: Path) -> dict[str, float]:
    """Figures of one arm, in seconds, bytes and shares; see the module."""
    arm = next(arm for arm in ARMS if arm.label == label)
    state = make()
    size = sum(tensor.nbytes for tensor in state.tensors().values())
    figures: dict[str, float] = {"bytes": size, "step": state.step_seconds}
    figures["disk write"], figures["disk read"] = _disk(state, folder / "plain")
    with _peak_memory() as alone:
        if state.step is not None:
            state.step()
            state.step()
    with _peak_memory() as memory:
        figures["first stall"] = _save(arm, state, folder)["stall"]
        for path in folder.iterdir():  # nothing is to be deleted or written over in the second
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        figures |= _save(arm, state, folder)
    figures["memory"] = (memory[0] - alone[0]) / size
    _forget_pages(folder)
    began = time.perf_counter()
    arm.load(state, folder)
    figures["load"] = time.perf_counter() - began
    return figures


def _save(arm: Arm, state: State, folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    finish = arm.begin(state, folder)
    stall = time.perf_counter() - began
    ended: list[float] = []

    def wait() -> None:
        finish()
        ended.append(time.perf_counter())

    # `finish` waits in a thread, so that training can go on beside it.
    waiter = threading.Thread(target=wait)
    waiter.start()
    steps = []
    while state.step is not None and waiter.is_alive():
        step_began = time.perf_counter()
        state.step()
        steps.append(time.perf_counter() - step_began)
    waiter.join()
    slower = statistics.median(steps) / state.step_seconds - 1 if steps else 0.0
    return {"stall": stall, "slower": slower, "save": ended[0] - began}


def _disk(state: State, path: Path) -> tuple[float, float]:
    """Seconds that a plain write with fsync, and a plain cold read, of these bytes take."""
    arrays: list[Any] = [tensor.reshape(-1).numpy() for tensor in state.tensors().values()]
    views = [memoryview(array).cast("B") for array in arrays]
    began = time.perf_counter()
    with open(path, "wb") as file:
        for view in views:
            file.write(view)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - began
    _forget_pages(path.parent)
    buffer = bytearray(4 << 20)
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = time.perf_counter() - began
    path.unlink()
    return written, read


def _forget_pages(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Most private memory of the process meanwhile, in bytes; looks every 5 ms."""
    peak, over = [float(private_memory())], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], private_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _child(sender: Any, label: str, make: Callable[[], State], folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        result: Any = measure(label, make, folder)
    except BaseException as error:  # whatever a peer raises is its row's matter, not ours
        result = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    sender.send(result)
    sender.close()
    os._exit(0)  # no peer's threads are waited for


def _in_process(label: str, make: Callable[[], State], directory: Path) -> dict[str, float] | str:
    """Figures of one arm, or why there are none."""
    # From a process that has imported everything and started no thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["archscale.bench.checkpoint"])
    receiver, sender = context.Pipe(duplex=False)
    folder = Path(tempfile.mkdtemp(dir=directory))
    arguments = sender, label, make, folder, torch.get_num_threads()
    process = context.Process(target=_child, args=arguments)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_LIMIT) else f"took longer than {_LIMIT} s"
    except EOFError:
        return "its process died"
    finally:
        process.kill()
        process.join()
        shutil.rmtree(folder, ignore_errors=True)


# --- the table


def bench_checkpoint(
    states: Mapping[str, Callable[[], State]], arms: Sequence[Arm], directory: Path, rounds: int
) -> dict[str, list[Row]]:
    """By state, a row for each arm: medians over `rounds` processes, which write under
    `directory`."""
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    failed: dict[tuple[str, str], str] = {}
    order = [(name, arm.label) for name in states for arm in arms]
    generator = random.Random(0)
    for _ in range(rounds):
        for name, label in generator.sample(order, len(order)):
            result = _in_process(label, states[name], directory)
            if isinstance(result, str):
                failed[name, label] = result
                print(f"{label}, {name}: {result}", file=sys.stderr)
            else:
                measured.setdefault((name, label), []).append(result)
    return {
        name: [
            _row(arm.label, measured.get((name, arm.label)), failed.get((name, arm.label)))
            for arm in arms
        ]
        for name in states
    }


def _row(label: str, figures: list[dict[str, float]] | None, failed: str | None) -> Row:
    if not figures:
        return {"saver": label, "failed": failed}

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(of, figures))

    return {
        "saver": label,
        "stall, ms": 1e3 * median(lambda f: f["stall"]),
        "% of a step": 100 * median(lambda f: f["stall"] / f["step"]),
        "first, ms": 1e3 * median(lambda f: f["first stall"]),
        "slower, %": 100 * median(lambda f: f["slower"]),
        "save, s": median(lambda f: f["save"]),
        "of disk": median(lambda f: f["save"] / f["disk write"]),
        "load, s": median(lambda f: f["load"]),
        "of disk's": median(lambda f: f["load"] / f["disk read"]),
        "memory, states": median(lambda f: f["memory"]),
        "state, MB": median(lambda f: f["bytes"]) / 1e6,
        "step, s": median(lambda f: f["step"]),
        "disk, GB/s": median(lambda f: f["bytes"] / f["disk write"]) / 1e9,
        "disk read, GB/s": median(lambda f: f["bytes"] / f["disk read"]) / 1e9,
    }


def report(
    config: Config, *, size: int, rounds: int, peers: bool, directory: Path | None, as_json: bool
) -> str:
    """The tables as text, or as JSON.

    Args:
        size: bytes of the state beside the config's; 0: only the config's.
        peers: also those of torch.
        directory: on the disk to be measured; None: that of temporary files.

    Raises:
        ConfigError: what `archscale plan` would say of the model; no room in `directory`.
    """
    values = config.resolved()
    planned = plan_one_process(values).config
    states: dict[str, Callable[[], State]] = {config.name: partial(trained_state, values)}
    if size:
        states[f"{size / 1e9:g} GB"] = partial(sized_state, size, planned.batch_tokens)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        free = shutil.disk_usage(folder).free
        if free < 3 * size:
            raise ConfigError(
                f"{free / 1e9:.1f} GB are free, {3 * size / 1e9:.1f} are needed",
                folder,
                "give --directory on another disk, or a smaller --size",
            )
        tables = bench_checkpoint(states, ARMS if peers else ARMS[:2], Path(folder), rounds)
    where = machine(torch.device("cpu"))
    if as_json:
        return json.dumps({"machine": where, "states": tables}, indent=1)
    lines = [where]
    for name, rows in tables.items():
        lines += ["", f"{name}, {rounds} rounds", "", markdown(rows)]
    return "\n".join(lines)
