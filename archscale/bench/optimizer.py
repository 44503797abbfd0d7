"""`archscale bench optimizer`: one optimizer step, ours and every installed peer, on the same
matrices in the same run.

Arms are interleaved and their order is shuffled every round, so that a noisy machine disturbs all
of them alike. Three comparisons with archscale muon in the same dtype: medians and spread, fastest
times (which others' load disturbs least), and the median over rounds of the ratio within a round,
with a 95 % bootstrap interval. `without Q` is our step with its orthogonalization left out. Every
arm gets fresh copies of the same gradients outside the timing. FLOPs are the nominal direct form, 5
(4 m² n + 2 m³) with m the short side, whatever an implementation saves; the machine's own matmul
rate is measured between the arms.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from archscale.bench.timing import machine, matmul_rate, paired_ratio, spread, synchronize
from archscale.errors import ConfigError
from archscale.optim import MatrixOptimizer, engine

OURS = ("muon", "orscale_lm", "muonh")
# label → (module, class, parameter group); each orthogonalizes in bfloat16, five iterations
PEERS = {
    "torch.optim.Muon": ("torch.optim", "Muon", {"lr": 0.02}),
    "pytorch_optimizer.Muon": ("pytorch_optimizer", "Muon", {"lr": 0.02, "use_muon": True}),
    "heavyball.Muon": ("heavyball", "Muon", {"lr": 0.02}),
    "torch.optim.AdamW": ("torch.optim", "AdamW", {"lr": 0.001}),
}
Shape = tuple[int, int, int]  # (count, m, n)


@dataclass
class Arm:
    """One optimizer on its own copy of the matrices."""

    label: str
    dtype: str  # of the orthogonalization
    params: list[nn.Parameter]
    step: Callable[[], Any]
    ours: bool = False


@dataclass
class ArmTimes:
    """What was measured of one arm."""

    label: str
    dtype: str
    seconds: float  # median
    fastest: float  # seconds
    spread: float  # (90th − 10th percentile) / median
    fastest_ratio: float | None  # of the fastest times, to archscale muon's in the same dtype
    # Median ratio within a round, ends of its 95 % interval.
    paired: tuple[float, float, float] | None
    rest: float | None  # fastest step without its orthogonalization, seconds
    rate: float | None  # nominal FLOP/s
    share: float | None  # of the matmul rate in the same dtype


def parse_shapes(texts: Sequence[str]) -> list[Shape]:
    """`28x512x512` is 28 matrices of 512 × 512; `512x512` is one."""
    shapes: list[Shape] = []
    for text in texts:
        parts = text.lower().split("x")
        if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ConfigError(
                f"{text!r} is not a shape",
                "--shape",
                "write COUNTxROWSxCOLS, for example 28x512x512",
            )
        count, m, n = ([1] if len(parts) == 2 else []) + [int(part) for part in parts]
        shapes.append((count, m, n))
    return shapes


def nominal_flops(shapes: Sequence[Shape]) -> int:
    """FLOPs of orthogonalizing every matrix once: 5 (4 m² n + 2 m³), m the short side."""
    return sum(
        count * 5 * (4 * min(m, n) ** 2 * max(m, n) + 2 * min(m, n) ** 3) for count, m, n in shapes
    )


def bench_optimizer(
    shapes: Sequence[Shape],
    *,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
    rounds: int = 7,
    peers: bool = True,
    limit: float = 60.0,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Measure all arms; see the module. Returns {rows, matmul (FLOP/s by dtype), missing (peers and
    why), machine}.

    A peer whose first step, which may compile, takes longer than `limit` seconds is missing.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gradients = _matrices(shapes, device, seed=1)
    arms, missing = [], {}
    for dtype in dtypes:
        for rule in OURS:
            params = [nn.Parameter(w) for w in _matrices(shapes, device, seed=0)]
            optimizer = MatrixOptimizer(
                params, lr=0.02, rule=rule, compute_dtype=getattr(torch, dtype)
            )
            arms.append(Arm(f"archscale {rule}", dtype, params, optimizer.step, ours=True))
    for label, (module, name, group) in PEERS.items() if peers else ():
        params = [nn.Parameter(w) for w in _matrices(shapes, device, seed=0)]
        try:
            peer = getattr(importlib.import_module(module), name)([{"params": params, **group}])
            arm = Arm(label, "-" if name == "AdamW" else "bfloat16", params, peer.step)
            with _at_most(limit):
                _time(arm, gradients, device)  # compiles, allocates, or fails
        except Exception as error:  # a peer that does not run here is reported, not hidden
            missing[label] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            continue
        arms.append(arm)
    seconds: list[list[float]] = [[] for _ in arms]
    rests: list[list[float]] = [[] for _ in arms]
    matmul: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for arm in arms:
        _time(arm, gradients, device)
    size = max(min(m, n) for _, m, n in shapes)
    order = list(range(len(arms)))
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        for i in order:
            seconds[i].append(_time(arms[i], gradients, device))
            if arms[
                i
            ].ours:  # what the rules can differ in: momentum, copies, inner products, update
                with mock.patch.object(
                    engine, "orthogonalize_", lambda stack, *_: stack.new_ones(len(stack))
                ):
                    rests[i].append(_time(arms[i], gradients, device))
        for dtype in dtypes:
            matmul[dtype].append(matmul_rate(size, getattr(torch, dtype), device))
    rates = {dtype: statistics.median(values) for dtype, values in matmul.items()}
    base = {arm.dtype: seconds[i] for i, arm in enumerate(arms) if arm.label == "archscale muon"}
    rows = []
    for arm, measured, rest in zip(arms, seconds, rests):
        median, fastest, muon = statistics.median(measured), min(measured), base.get(arm.dtype)
        rate = nominal_flops(shapes) / median if arm.dtype in rates else None
        rows.append(
            ArmTimes(
                arm.label,
                arm.dtype,
                median,
                fastest,
                spread(measured),
                fastest / min(muon) if muon else None,
                paired_ratio(measured, muon) if muon else None,
                min(rest, default=None),
                rate,
                rate / rates[arm.dtype] if rate else None,
            )
        )
    return {
        "rows": rows,
        "matmul": rates,
        "missing": missing,
        "machine": machine(device),
        "shapes": list(shapes),
    }


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so long, as soon as Python code runs again."""

    def expire(*_: Any) -> None:
        raise TimeoutError(f"its first step takes more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, expire)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def bench_distributed(
    shapes: Sequence[Shape],
    processes: int,
    *,
    dtype: str = "float32",
    rounds: int = 7,
    rule: str = "orscale_lm",
) -> dict[str, Any]:
    """One rank's step against `processes` ranks' on FSDP2 shards, one thread per process in both
    arms.

    Returns {one, many (median seconds), ratio, bytes (sent in the exchanges, all ranks), packed
    (what the two packed exchanges carry at least)}.
    """
    alone = _spawn(1, shapes, dtype, rounds, rule)
    together = _spawn(processes, shapes, dtype, rounds, rule)
    again = _spawn(1, shapes, dtype, rounds, rule)
    one = statistics.median(alone[0][0] + again[0][0])
    many = statistics.median([max(times) for times in zip(*(rank[0] for rank in together))])
    elements = sum(count * m * n for count, m, n in shapes)
    size = getattr(torch, dtype).itemsize
    # What a rank owns and holds never travels.
    packed = round(2 * elements * (1 - 1 / processes) * size)
    return {
        "one": one,
        "many": many,
        "ratio": many / one,
        "bytes": sum(rank[1] for rank in together),
        "packed": packed,
        "processes": processes,
        "dtype": dtype,
    }


def _spawn(
    processes: int, shapes: Sequence[Shape], dtype: str, rounds: int, rule: str
) -> list[tuple[list[float], int]]:
    import multiprocessing
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(
            target=_worker,
            args=(rank, processes, port, list(shapes), dtype, rounds, rule, results),
            daemon=True,
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    measured = dict(results.get(timeout=900) for _ in workers)
    for worker in workers:
        worker.join()
    return [measured[rank] for rank in range(processes)]


def _worker(
    rank: int,
    world: int,
    port: int,
    shapes: list[Shape],
    dtype: str,
    rounds: int,
    rule: str,
    results: Any,
) -> None:
    """One rank: times `rounds` steps from barrier to end."""
    import os

    from archscale import distributed

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    device = distributed.start()
    shard_rows = distributed.shard_rows
    params = [nn.Parameter(shard_rows(w)) for w in _matrices(shapes, device, seed=0)]
    gradients = [shard_rows(g) for g in _matrices(shapes, device, seed=1)]
    optimizer = MatrixOptimizer(params, lr=0.02, rule=rule, compute_dtype=getattr(torch, dtype))
    times = []
    for _ in range(rounds + 2):
        for p, g in zip(params, gradients):
            p.grad = g.clone()
        distributed.barrier()
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    results.put((rank, (times[2:], optimizer.bytes_sent())))
    distributed.stop()


def _time(arm: Arm, gradients: Sequence[Tensor], device: torch.device) -> float:
    for p, g in zip(arm.params, gradients):
        p.grad = g.clone()
    synchronize(device)
    began = time.perf_counter()
    arm.step()
    synchronize(device)
    return time.perf_counter() - began


def _matrices(shapes: Sequence[Shape], device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(m, n, generator=generator) / n**0.5).to(device)
        for count, m, n in shapes
        for _ in range(count)
    ]


def report(
    groups: Sequence[Sequence[Shape]],
    *,
    rounds: int,
    dtypes: Sequence[str],
    peers: bool,
    limit: float,
    processes: int,
    as_json: bool,
) -> str:
    """All measurements of `archscale bench optimizer`, as Markdown tables or as JSON."""
    unknown = [dtype for dtype in dtypes if dtype not in ("float32", "bfloat16")]
    if unknown:
        raise ConfigError(f"dtype {unknown[0]!r}", "--dtype", "give float32 or bfloat16")
    results = []
    for shapes in groups:
        measured = bench_optimizer(shapes, dtypes=dtypes, rounds=rounds, peers=peers, limit=limit)
        if processes > 1:
            measured["distributed"] = [
                bench_distributed(shapes, processes, dtype=dtype, rounds=rounds) for dtype in dtypes
            ]
        results.append(measured)
    if as_json:
        return json.dumps(
            [{**r, "rows": [asdict(row) for row in r["rows"]]} for r in results], indent=1
        )
    return "\n".join(_table(measured) for measured in results)


def _table(measured: dict[str, Any]) -> str:
    shapes = ", ".join(f"{count} × {m}×{n}" for count, m, n in measured["shapes"])
    rates = ", ".join(
        f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in measured["matmul"].items()
    )
    lines = [f"\n{shapes} on {measured['machine']}; matmul {rates}", ""]
    lines += [
        (
            "| optimizer | dtype | ms (median) | spread | fastest | fastest / muon's | paired ratio"
            " to muon, 95 % | without Q (fastest) | nominal GFLOP/s | of matmul rate |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in measured["rows"]:
        ratio = f"{row.fastest_ratio:.3f}" if row.fastest_ratio else "–"
        paired = "{:.3f} [{:.3f}, {:.3f}]".format(*row.paired) if row.paired else "–"
        rest = f"{row.rest * 1e3:,.1f}" if row.rest else "–"
        rate = f"{row.rate / 1e9:,.0f} | {row.share:.0%}" if row.rate else "– | –"
        lines.append(
            f"| {row.label} | {row.dtype} | {row.seconds * 1e3:,.1f} | {row.spread:.0%} |"
            f" {row.fastest * 1e3:,.1f} | {ratio} | {paired} | {rest} | {rate} |"
        )
    lines += [f"not measured: {label} ({reason})" for label, reason in measured["missing"].items()]
    for d in measured.get("distributed", []):
        lines.append(
            f"{d['processes']} ranks, {d['dtype']}: {d['many'] * 1e3:,.1f} ms against"
            f" {d['one'] * 1e3:,.1f} ms on one (ratio {d['ratio']:.3f}); {d['bytes']:,} bytes sent,"
            f" {d['bytes'] / d['packed']:.3f} of the two packed exchanges"
        )
    return "\n".join(lines)
