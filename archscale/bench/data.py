"""`archscale bench data`: the loader beside those of installed peers, on the same random tokens.

Each reader writes the tokens in its own format, then reads shuffled batches in a process of its
own; readers alternate in rounds. Measured of each:

    tokens/s     batches taken as fast as they come
    wait         share of a training step that waits for its batch, steps being matrix products of
                 a given length
    first batch  seconds from opening to the first batch: at the beginning and late. Late is sample
                 10^12 for ours, which has no end, and the middle of the data for others
    memory       private memory of the process and its workers above that before opening (`RssAnon`
                 of Linux); mapped files do not count
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from archscale.bench.loaders import READERS, VOCAB, Reader, Task
from archscale.bench.table import Row, markdown
from archscale.bench.timing import machine

_LIMIT = 600  # seconds that a reader may take to write or to read
_STEPS = 20  # steps that the wait is taken from


class Reading(NamedTuple):
    """One measurement of a reader, in a process of its own."""

    tokens_per_second: float
    wait: float  # share of a step
    first: float  # seconds
    late: float  # seconds
    memory: int  # bytes


def bench_data(
    *, tokens: int, context: int, batch: int, rounds: int, step: float, readers: Sequence[Reader]
) -> list[Row]:
    """A row for each installed reader.

    Args:
        tokens: that are written and read.
        context, batch: a batch is `batch` windows of `context` + 1 tokens.
        rounds: measurements of each reader; the medians are reported.
        step: seconds of the steps that the wait is measured in.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tokens.npy"
        generator = np.random.default_rng(0)
        np.save(source, generator.integers(0, VOCAB, tokens, np.uint16))
        tasks: dict[str, Task] = {}
        failed: dict[str, str] = {}
        for number, reader in enumerate(readers):
            task = Task(source, Path(folder) / str(number), context, batch)
            task.folder.mkdir()
            tasks[reader.label] = task
            _try(failed, reader, partial(reader.write, task))
        measured: dict[str, list[Reading]] = {reader.label: [] for reader in readers}
        for _ in range(rounds):
            for reader in readers:
                task = tasks[reader.label]
                reading = _try(failed, reader, partial(_measure, reader, task, step))
                if reading is not None:
                    measured[reader.label].append(reading)
    return [_row(reader, measured[reader.label], failed, measured) for reader in readers]


def _try(failed: dict[str, str], reader: Reader, work: Callable[[], Any]) -> Any:
    """The result of `work` in a child process; None, and the reason kept, where it failed."""
    if reader.label in failed:
        return None
    # From a process without threads: one forked from here could inherit a lock that nobody frees.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["archscale.bench.loaders"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work))
    process.start()
    sender.close()
    try:
        if receiver.poll(_LIMIT):
            ok, result = receiver.recv()
        else:
            ok, result = False, f"took longer than {_LIMIT} s"
    except EOFError:
        ok, result = False, "its process died"
    process.kill()
    process.join()
    if not ok:
        failed[reader.label] = result
        print(f"{reader.label}: {result}", file=sys.stderr)
    return result if ok else None


def _child(sender: Any, work: Callable[[], Any]) -> None:
    try:
        result = (True, work())
    except BaseException as error:  # whatever a peer raises is its row's matter, not ours
        text = " ".join(str(error).split())[:200]
        result = (False, f"{type(error).__name__}: {text}")
    sender.send(result)


def _measure(reader: Reader, task: Task, step: float) -> Reading:
    batches = (len(task.array()) // (task.context + 1)) // task.batch
    list(itertools.islice(reader.batches(task, 0), 1))  # imports, page cache
    before = private_memory()
    stream, first = _open(reader, task, 0)
    taken, began = 0, time.perf_counter()
    for _ in itertools.islice(stream, batches // 2 - 1):
        taken += 1
    rate = taken * task.batch * task.context / (time.perf_counter() - began)
    memory = private_memory() - before
    stream.close()
    late_start = batches // 2 if reader.first is None else reader.first // task.batch
    stream, late = _open(reader, task, late_start)
    stream.close()
    stream, _ = _open(reader, task, 0)
    wait = _wait(stream, step, batches)
    stream.close()
    return Reading(rate, wait, first, late, memory)


def _open(reader: Reader, task: Task, number: int) -> tuple[Any, float]:
    """The batches from `number` on but the first, and the seconds until that came."""
    began = time.perf_counter()
    stream = reader.batches(task, number)
    next(stream)
    return stream, time.perf_counter() - began


def _wait(stream: Iterator[torch.Tensor], step: float, batches: int) -> float:
    """Share of steps of `step` seconds that waits for a batch."""
    matrix = torch.randn(512, 512)
    waited = worked = 0.0
    for _ in range(min(_STEPS, batches // 2)):
        began = time.perf_counter()
        while time.perf_counter() - began < step:
            matrix @ matrix
        ready = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - ready
        worked += ready - began
    return waited / (waited + worked)


def private_memory() -> int:
    """Bytes of anonymous memory that this process and its children hold."""
    pending, total = ["self"], 0
    while pending:
        process = Path("/proc") / pending.pop()
        try:
            status = (process / "status").read_text()
            for thread in (process / "task").iterdir():
                pending += (thread / "children").read_text().split()
        except OSError:  # it has ended
            continue
        line = next((x for x in status.splitlines() if x.startswith("RssAnon:")), "RssAnon: 0")
        total += int(line.split()[1]) * 1024
    return total


def _row(
    reader: Reader,
    readings: list[Reading],
    failed: dict[str, str],
    measured: dict[str, list[Reading]],
) -> Row:
    if reader.label in failed or not readings:
        return {"reader": reader.label, "failed": failed.get(reader.label, "nothing was read")}
    rates = [reading.tokens_per_second for reading in readings]
    ours = [reading.tokens_per_second for reading in measured[READERS[0].label]]
    middle = Reading(*(statistics.median(column) for column in zip(*readings)))
    return {
        "reader": reader.label,
        "tokens/s": middle.tokens_per_second,
        "lowest": min(rates),
        "highest": max(rates),
        "of ours": statistics.median(a / b for a, b in zip(rates, ours)) if ours else None,
        "wait, % of a step": 100 * middle.wait,
        "first batch, ms": 1e3 * middle.first,
        "late, ms": 1e3 * middle.late,
        "memory, MB": middle.memory / 1e6,
    }


def report(
    *, tokens: int, context: int, batch: int, rounds: int, step: float, peers: bool, as_json: bool
) -> str:
    """The table as text, or as JSON."""
    candidates = READERS if peers else READERS[:1]
    readers = [reader for reader in candidates if reader.installed]
    absent = [reader.label for reader in candidates if not reader.installed]
    rows = bench_data(
        tokens=tokens, context=context, batch=batch, rounds=rounds, step=step, readers=readers
    )
    where = machine(torch.device("cpu"))
    if as_json:
        return json.dumps({"machine": where, "rows": rows, "not installed": absent}, indent=1)
    lines = [
        where,
        f"{tokens:,} tokens, batches of {batch} x {context}, steps of {1e3 * step:g} ms",
        "",
        markdown(rows),
    ]
    if absent:
        lines += ["", f"not installed: {', '.join(absent)}"]
    return "\n".join(lines)
