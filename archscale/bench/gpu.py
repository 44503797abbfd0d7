"""`archscale bench gpu`: what to measure in the first hours on a GPU, check by check (README.md).

Each check runs a few cases and gives a table of them; a case that fails is a row of its own and
hides no other. With `tiny` all of it runs on a CPU, in small sizes and without compiling; the lines
that need CUDA have not yet run on a GPU. Random weights and tokens: nothing is read from disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from archscale.bench.table import Row, cell, markdown
from archscale.bench.timing import Stopwatch, machine, milliseconds, synchronize
from archscale.bench.workload import DOCUMENT_TOKENS, EOS, Workload
from archscale.config.layers import Layer, merge
from archscale.errors import ArchscaleError
from archscale.model import transformer
from archscale.model.layers import attention_mask, masked_attention
from archscale.model.loss import cross_entropy_sum
from archscale.model.segments import (
    Segments,
    device_takes_segments,
    segment_attention,
    segment_bounds,
)
from archscale.optim import engine, layout
from archscale.optim.orthogonalize import plain_symmetric_product, symmetric_product
from archscale.optim.shards import plan_exchange
from archscale.parallel import native
from archscale.plan.counting import parameters, training_flops
from archscale.plan.devices import this_device
from archscale.telemetry.stability import log_sum_exp
from archscale.yaml_reader import parse_yaml

Values = dict[str, Any]

BATCH_TOKENS = 1 << 19  # of a step, at which the optimizer's share is stated
BACKENDS = {-1: "error", 0: "math", 1: "flash", 2: "efficient", 3: "cuDNN", 4: "overrideable"}
SHAPES: dict[str, Values] = parse_yaml(
    """
tiny: {depth: 2, width: 64, head_dim: 16, context: 64, vocab_size: 256}
small: {depth: 2, width: 256, head_dim: 64, context: 256, vocab_size: 1024}
1b: {depth: 18, aspect: 128, head_dim: 128, mlp: relu2, context: 4096, vocab_size: 50304,
     qk_norm: false, gated_attention: false, tied_embeddings: true}  # configs/orscale/1b.yaml
moe: {depth: 8, width: 1024, kv_heads: 4, head_dim: 128, context: 4096, vocab_size: 32000}
hf: {depth: 16, width: 2048, head_dim: 128, context: 4096, vocab_size: 32000}
""",
    "SHAPES",
)
SMOKE: dict[str, Values] = parse_yaml(
    """
dense: {}
dense, eager: {training: {compile: false}}
grouped queries, document mask: {model: {kv_heads: 2}, data: {document_mask: true}}
window: {model: {window: 64}}
recomputation: {training: {activation_checkpoint: block}}
experts: {model: &experts {moe: {sparsity: 4, top_k: 4}}}
experts, eager: {model: *experts, training: {compile: false}}
experts, recomputation: {model: *experts, training: {activation_checkpoint: block}}
tied, relu2: {model: {tied_embeddings: true, mlp: relu2, gated_attention: false, qk_norm: false}}
muonh: {optimizer: {matrix: {rule: muonh}}}
orscale_lm: {optimizer: {matrix: {rule: orscale_lm}}}
adamw: {optimizer: {matrix: {rule: adamw}}}
float32: {training: {precision: fp32}}
float32 experts: {model: *experts, training: {precision: fp32}}
""",
    "SMOKE",
)
SCALED: Values = {"optimizer": {"matrix": {"rule": "orscale_lm"}, "weight_decay": 0.1}}
MAY_WAIT = {"float32 experts"}  # without a grouped product it takes the experts one by one


@dataclass
class Bench:
    """What a check runs on, and the rows that it has so far.

    Attributes:
        tiny: sizes for a CPU. micro_batch: sequences per forward pass of the large models.
        repeats: measurements of each time.
    """

    device: torch.device
    tiny: bool = False
    micro_batch: int = 4
    repeats: int = 10
    rows: list[Row] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def case(self, label: str, measure: Callable[[], Row]) -> None:
        """Run one case; its row is also printed to stderr at once, for a run that is cut short."""
        try:
            row = {"case": label} | measure()
        except Exception as error:  # what a check is for: the other cases say more of it
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            row = {"case": label, "failed": f"{text} ({Path(last.filename).name}:{last.lineno})"}
        self.rows.append(row)
        said = ", ".join(f"{key} {cell(value)}" for key, value in row.items() if key != "case")
        print(f"{label}: {said}", file=sys.stderr, flush=True)
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def milliseconds(self, run: Callable[[], Any]) -> float:
        return milliseconds(run, self.device, self.repeats)

    def peak(self) -> float | None:
        """Gigabytes allocated at most since the case began."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of one run, to the end of what it has started on the device."""
        began = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - began


def values_of(
    bench: Bench, shape: str, micro_batch: int, accumulation: int, changes: Values
) -> Values:
    """Keys of a config: a shape of `SHAPES`, a batch of so many sequences and micro-batches, and
    `changes`. Every rule can train it."""
    model = SHAPES["tiny" if bench.tiny else shape]
    tokens = accumulation * micro_batch * model["context"]
    base = {
        "name": shape,
        "model": model,
        "data": {"train": "random tokens"},
        "training": {"tokens": 1e9, "batch_tokens": tokens, "micro_batch": micro_batch},
        "parameterization": {"kind": "standard", "base": {"lr": 1e-3}},
    }
    eager = {"training": {"compile": False}} if bench.tiny else {}
    return merge([Layer("", base), Layer("", changes), Layer("", eager)])


@torch.no_grad()
def fill_on_device(model: nn.Module) -> None:
    """Random weights: the config's own take most of a minute a billion on one core."""
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)


# --- attention and kernel


def attention(bench: Bench) -> None:
    """Every form of attention that a model can have."""
    B, H, T, K = (1, 6, 64, 16) if bench.tiny else (bench.micro_batch, 18, 4096, 128)
    scale = K**-0.5
    tokens = torch.ones(B, T, dtype=torch.int64, device=bench.device)
    tokens[:, ::DOCUMENT_TOKENS] = EOS

    def form(heads: int, eos: int | None, window: int | None, dtype: torch.dtype) -> Row:
        def heads_of(count: int) -> Tensor:
            x = torch.randn(B, T, count, K, device=bench.device, dtype=dtype)
            return x.transpose(1, 2).requires_grad_()

        q, k, v = heads_of(H), heads_of(heads), heads_of(heads)
        mask = attention_mask(tokens, window, eos, dtype)
        how = {"is_causal": mask is None, "scale": scale, "enable_gqa": heads != H}
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, **how)
        run = functools.partial(F.scaled_dot_product_attention, q, k, v, mask, **how)
        gradient = torch.randn_like(run())
        forward = bench.milliseconds(run)
        both = bench.milliseconds(lambda: run().backward(gradient))
        useful = 4 * B * H * K * T * T / 2  # the causal half, whatever the kernel does
        return {
            "backend": BACKENDS.get(choice, str(choice)),
            "forward, ms": forward,
            "useful TFLOP/s": useful / forward / 1e9,
            "forward and backward, ms": both,
            "of both, useful TFLOP/s": 3.5 * useful / both / 1e9,
        }

    half = torch.bfloat16
    forms: list[tuple[str, int, int | None, int | None, torch.dtype]] = [
        ("causal", H, None, None, half),
        ("causal, grouped queries", H // 3, None, None, half),
        ("document mask", H, EOS, None, half),
        ("document mask, grouped queries", H // 3, EOS, None, half),
        ("window", H, None, T // 8, half),
        ("causal, grouped queries, float32", H // 3, None, None, torch.float32),
    ]
    for label, heads, eos, window, dtype in forms:
        bench.case(label, functools.partial(form, heads, eos, window, dtype))

    def z_value(eos: int | None) -> Row:
        q, k = (torch.randn(B, H, T, K, device=bench.device, dtype=half) for _ in range(2))
        mask = attention_mask(tokens, None, eos, half)
        return {"forward, ms": bench.milliseconds(lambda: log_sum_exp(q, k, scale, mask))}

    bench.case("Z-value", lambda: z_value(None))
    bench.case("Z-value, document mask", lambda: z_value(EOS))

    segment_forms: list[tuple[str, int, int | None, int | None]] = [
        ("documents", H, EOS, None),
        ("documents, grouped queries", H // 3, EOS, None),
        ("window", H, None, T // 8),
        ("documents and window, grouped queries", H // 3, EOS, T // 8),
    ]
    for label, heads, eos, window in segment_forms:
        case = functools.partial(_segments, bench, tokens, (H, heads, K), eos, window)
        bench.case(f"segments: {label}", case)


def _segments(
    bench: Bench,
    tokens: Tensor,
    heads: tuple[int, int, int],
    eos: int | None,
    window: int | None,
) -> Row:
    """Attention on segments, in time and beside the mask that they stand for: the largest
    difference of outputs, gradients and Z-values, each over the largest number of its kind.

    Args:
        tokens: (B, T). heads: of queries, of keys and values, and their channels.
    """
    queries, keys, channels = heads
    if not device_takes_segments(bench.device, torch.bfloat16, channels):
        return {"segments": "not on this device"}
    scale, (batch, context) = channels**-0.5, tokens.shape
    bounds = segment_bounds(tokens.cpu(), eos, None).to(bench.device)
    segments = Segments(bounds, context, window)
    mask = attention_mask(tokens, window, eos, torch.bfloat16)
    shape = batch, context

    def heads_of(count: int) -> Tensor:
        x = torch.randn(*shape, count, channels, device=bench.device, dtype=torch.bfloat16)
        return x.requires_grad_()

    inputs = heads_of(queries), heads_of(keys), heads_of(keys)
    q, k, v = (x.transpose(1, 2) for x in inputs)

    def masked() -> Tensor:
        return masked_attention(q, k, v, mask, scale).transpose(1, 2)

    def segmented() -> Tensor:
        return segment_attention(*inputs, segments, scale)[0]

    gradient = torch.randn_like(masked())
    row: Row = {"forward, ms": bench.milliseconds(segmented)}
    both = bench.milliseconds(lambda: segmented().backward(gradient))
    row["forward and backward, ms"] = both
    lse = segment_attention(*inputs, segments, scale)[1]
    found, expected = (
        [run(), *torch.autograd.grad(run(), inputs, gradient)] for run in (segmented, masked)
    )
    found.append(lse.unflatten(1, shape).transpose(0, 1))
    expected.append(log_sum_exp(q.detach(), k.detach(), scale, mask))
    for name, a, b in zip(("output", "dq", "dk", "dv", "Z-value"), found, expected):
        row[f"{name}, difference"] = ((a - b).abs().max() / b.abs().max()).item()
    return row


def kernel(bench: Bench) -> None:
    """The symmetric products of the orthogonalization, ours beside the library's."""
    shapes = [(8, 512, 512), (8, 512, 2048), (8, 1024, 1024), (8, 1024, 4096)]
    shapes += [(1, 2304, 2304), (4, 2304, 2304), (1, 2304, 9216), (2, 4096, 4096)]

    def products(k: int, m: int, n: int) -> Row:
        X = torch.randn(k, m, n, device=bench.device).bfloat16()
        A = torch.randn(k, m, m, device=bench.device).bfloat16()
        A = A + A.mT
        runs: dict[str, tuple[int, Callable[[], Tensor]]] = {
            "bmm X Xᵀ": (n, lambda: torch.bmm(X, X.mT)),
            "ours X Xᵀ": (n, lambda: symmetric_product(X)),
            "baddbmm A² + A": (m, lambda: torch.baddbmm(A, A, A.mT)),
            "ours A² + A": (m, lambda: symmetric_product(A, A)),
        }
        row: Row = {}
        for name, (inner, run) in runs.items():  # nominal FLOPs: all of the product
            row[f"{name}, TFLOP/s"] = 2 * k * m * m * inner / bench.milliseconds(run) / 1e9
        ours = symmetric_product(X).float()
        error = (ours - torch.bmm(X.float(), X.mT.float())).abs().max() / ours.abs().max()
        return row | {"relative error": error.item()}

    for shape in [(1, 64, 64)] if bench.tiny else shapes:
        bench.case("{} × {}×{}".format(*shape), functools.partial(products, *shape))


# --- training


def smoke(bench: Bench) -> None:
    """Six steps of every path and one that is read; then float32 beside the CPU's."""

    def path(label: str, changes: Values) -> Row:
        began = time.perf_counter()
        work = Workload(values_of(bench, "small", 4, 2, changes), bench.device)
        losses = []
        for step in range(6):  # the first two compile and create what stays
            with _no_waiting(bench.cuda and step >= 2 and label not in MAY_WAIT):
                loss = work.step()["loss"]
            losses.append(loss.item())
        numbers = {k: v for k, v in work.step(looking=True).items() if isinstance(v, float)}
        broken = [key for key, value in numbers.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(f"not finite: {', '.join(broken)}")
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "first loss": losses[0], "sixth loss": losses[-1]}

    def beside_cpu() -> Row:
        exact = {"training": {"precision": "fp32", "compile": False}}
        values = values_of(bench, "small", 4, 2, exact)
        here, there = (Workload(values, d) for d in (bench.device, torch.device("cpu")))
        differences = [
            abs(here.step()["loss"].item() - there.step()["loss"].item()) for _ in range(10)
        ]
        return {"largest difference of the loss in 10 steps": max(differences)}

    for label, changes in SMOKE.items():
        bench.case(label, functools.partial(path, label, changes))
    bench.case("float32 beside the CPU", beside_cpu)


@contextlib.contextmanager
def _no_waiting(strict: bool) -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    if not strict:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def phases(work: Workload, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step by phase: `step` as a whole, `host` what Python takes to start
    it, and within it forward (head and loss included), head and loss, backward, clip, optimizer."""
    laps: list[tuple[str, Stopwatch]] = []

    def timed(label: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **options: Any) -> Any:
            watch = Stopwatch(work.device)
            result = run(*args, **options)
            laps.append((label, watch.stop()))
            return result

        return around

    module: Any = work.engine.module
    places = [
        ("forward", work.engine, "forward"),
        ("head and loss", module.head, "forward"),
        ("backward", work.engine, "backward"),
        ("clip", native, "clip_gradients"),
        ("optimizer", work.optimizer, "step"),
    ]
    measured: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        for label, owner, name in places:
            run = timed(label, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, run))
        for _ in range(repeats):
            laps.clear()
            synchronize(work.device)
            began = time.perf_counter()
            work.step()
            host = (time.perf_counter() - began) * 1e3
            synchronize(work.device)
            row = {"step": (time.perf_counter() - began) * 1e3, "host": host}
            for label, watch in laps:
                row[label] = row.get(label, 0.0) + watch.milliseconds()
            for label, value in row.items():
                measured.setdefault(label, []).append(value)
    return {label: sorted(values)[len(values) // 2] for label, values in measured.items()}


def training_row(bench: Bench, work: Workload) -> Row:
    """A step's phases and MFU, its peak memory, and the optimizer's share at `BATCH_TOKENS`."""
    for _ in range(3):
        work.step()
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    times, tokens = phases(work, bench.repeats), work.config.batch_tokens
    passes = times["forward"] + times["backward"]
    update = times["optimizer"] + times["clip"]
    flops, peak = training_flops(work.config.model) * tokens, this_device().peak
    return {
        "MFU": flops / times["step"] * 1e3 / peak if peak else None,
        "MFU of passes": flops / passes * 1e3 / peak if peak else None,
        **{f"{label}, ms": value for label, value in times.items()},
        "optimizer's share at 0.5M tokens": update / (update + passes * BATCH_TOKENS / tokens),
        "peak, GB": bench.peak(),
        "planned, GB": work.planned / 1e9,
    }


def loss_chunks(tokens: int) -> Any:
    """Within it the loss takes the logits of this many tokens at a time."""
    loss = functools.partial(cross_entropy_sum, chunk=tokens)
    return mock.patch.object(transformer, "cross_entropy_sum", loss)


def mfu(bench: Bench) -> None:
    """A dense model of 1.26B parameters: phases by the loss's chunk, and what a reading adds."""
    work: list[Workload] = []

    def start() -> Row:
        values = values_of(bench, "1b", bench.micro_batch, 2, SCALED)
        seconds = bench.seconds(lambda: work.append(Workload(values, bench.device)))
        return {
            "parameters": parameters(work[0].config.model).total,
            "built in, s": seconds,
            "first step, s": bench.seconds(work[0].step),
            "second step, s": bench.seconds(work[0].step),
        }

    def chunks(tokens: int) -> Row:
        with loss_chunks(tokens):
            return training_row(bench, work[0])

    def reading() -> Row:
        first = bench.seconds(lambda: work[0].step(looking=True))
        read = bench.milliseconds(lambda: work[0].step(looking=True))
        plain = bench.milliseconds(work[0].step)
        every = work[0].config.telemetry.every
        return {
            "first reading, s": first,
            "step, ms": plain,
            "step that is read, ms": read,
            "telemetry's share": (read / plain - 1) / every,
        }

    bench.case("start", start)
    if not work:
        return
    bench.case("as it is", lambda: training_row(bench, work[0]))
    for tokens in (83, 1024, 2048, 8192):
        bench.case(f"logits of {tokens} tokens at a time", functools.partial(chunks, tokens))
    bench.case("telemetry", reading)


def optimizer(bench: Bench) -> None:
    """The optimizer alone on the matrices of that model."""

    def rule(name: str, patch: Any) -> Row:
        changes = {
            "optimizer": {"matrix": {"rule": name}, "weight_decay": 0.0},
            "training": {"compile": False, "activation_checkpoint": "block"},
        }
        with patch:
            values = values_of(bench, "1b", bench.micro_batch, 2, changes)
            work = Workload(values, bench.device, fill=fill_on_device)
            for parameter in work.engine.module.parameters():
                parameter.grad = torch.randn_like(parameter) * 1e-4
            step = work.optimizer.step
            row: Row = {"first step, s": bench.seconds(step), "step, ms": bench.milliseconds(step)}
            began = time.perf_counter()
            step()
            row["host, ms"] = (time.perf_counter() - began) * 1e3
            synchronize(bench.device)
            row["kernels"] = _kernels_launched(step) if bench.cuda else None
            nothing = mock.patch.object(engine, "orthogonalize_", lambda M, *_: M.new_ones(len(M)))
            with nothing:
                row["without Q, ms"] = bench.milliseconds(step)
        return row

    module = sys.modules["archscale.optim.orthogonalize"]
    plain = mock.patch.object(module, "symmetric_product", plain_symmetric_product)
    larger = functools.partial(plan_exchange, max_batch_elements=1 << 27)
    batches = mock.patch.object(layout, "plan_exchange", larger)
    for label, name, patch in (
        ("orscale_lm", "orscale_lm", contextlib.nullcontext()),
        ("orscale_lm without the Triton kernel", "orscale_lm", plain),
        ("orscale_lm, batches of 2^27", "orscale_lm", batches),
        ("muonh", "muonh", contextlib.nullcontext()),
        ("adamw", "adamw", contextlib.nullcontext()),
    ):
        bench.case(label, functools.partial(rule, name, patch))


def _kernels_launched(run: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in record.key_averages())


def moe(bench: Bench) -> None:
    """Experts beside the dense model of equal active parameters."""
    fine = {"sparsity": 2, "top_k": 4} if bench.tiny else {"sparsity": 8, "top_k": 8}
    coarse = fine | {"top_k": 2}

    def model(experts: Values | None, accumulation: int) -> Row:
        changes = {"model": {"moe": experts}}
        values = values_of(bench, "moe", bench.micro_batch, accumulation, changes)
        work = Workload(values, bench.device, fill=fill_on_device)
        return {"first step, s": bench.seconds(work.step)} | training_row(bench, work)

    for label, experts, accumulation in (
        ("dense", None, 1),
        ("fine experts", fine, 1),
        ("coarse experts", coarse, 1),
        ("dense, accumulation 4", None, 4),
        ("fine experts, accumulation 4", fine, 4),
        ("the same, balance by sequence", fine | {"balance": "sequence"}, 4),
    ):
        bench.case(label, functools.partial(model, experts, accumulation))


def hf(bench: Bench) -> None:
    """Ours beside a compiled Qwen3 of transformers with a fused AdamW, in the same shape."""
    shape, B = SHAPES["tiny" if bench.tiny else "hf"], bench.micro_batch
    T = shape["context"]

    def ours(rule: str) -> Row:
        changes = {
            "model": {"tied_embeddings": True, "gated_attention": False},
            "optimizer": {"matrix": {"rule": rule}},
        }
        values = values_of(bench, "hf", B, 1, changes)
        work = Workload(values, bench.device, fill=fill_on_device)
        row = training_row(bench, work)
        return {"tokens/s": B * T / row["step, ms"] * 1e3} | row

    def theirs(dtype: torch.dtype) -> Row:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        heads = shape["width"] // shape["head_dim"]
        options: Values = {
            "vocab_size": shape["vocab_size"],
            "hidden_size": shape["width"],
            "intermediate_size": 4 * shape["width"],
            "num_hidden_layers": shape["depth"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": shape["head_dim"],
            "max_position_embeddings": T,
            "tie_word_embeddings": True,
            "attn_implementation": "sdpa",
        }
        model: Any = Qwen3ForCausalLM(Qwen3Config(**options))
        model = model.to(bench.device, dtype).train()
        update = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        forward = model if bench.tiny else torch.compile(model)
        tokens = torch.randint(0, shape["vocab_size"], (B, T), device=bench.device)

        def step() -> None:
            mixed = dtype == torch.float32
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=mixed):
                loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            update.step()
            update.zero_grad(set_to_none=True)

        first = bench.seconds(step)
        time_of_step = bench.milliseconds(step)
        return {
            "tokens/s": B * T / time_of_step * 1e3,
            "first step, s": first,
            "step, ms": time_of_step,
            "peak, GB": bench.peak(),
        }

    bench.case("ours, muonh", lambda: ours("muonh"))
    bench.case("ours, adamw", lambda: ours("adamw"))
    bench.case("Qwen3, bf16 autocast", lambda: theirs(torch.float32))
    bench.case("Qwen3, bf16 weights", lambda: theirs(torch.bfloat16))


CHECKS = {  # in the order in which they are worth their time
    check.__name__: check for check in (attention, kernel, smoke, mfu, optimizer, moe, hf)
}


# Check → minutes, what it settles, what is expected (arithmetic for an H100, not measured).
PROTOCOL = {
    "attention": (
        "1–2",
        "which backend each form of attention gets; what a mask and the Z-value cost",
        "cuDNN in bf16; a mask makes it 2.5 times as long",
    ),
    "kernel": (
        "1–2",
        "whether the Triton kernel is right; its rate beside the library's products",
        "relative error below 0.01; nominal rate above bmm's",
    ),
    "smoke": (
        "5–9",
        "every path runs, compiled and eager; no step waits for the GPU; float32 as on the CPU",
        "no row failed",
    ),
    "mfu": (
        "4–6",
        "a dense model of 1.26B: MFU by phase, tokens of the loss at a time, peak memory beside the"
        " plan, a reading",
        "MFU 48–54 %, less with 83 tokens of the loss at a time",
    ),
    "optimizer": (
        "3–5",
        "the optimizer alone on that model: products, the rest, launches, kernel, batches",
        "170–190 ms, 70–80 ms of them without Q",
    ),
    "moe": (
        "5–8",
        "experts beside dense at equal active parameters; accumulation; balance by sequence",
        "0.80–0.85 of dense",
    ),
    "hf": (
        "4–6",
        "tokens/s beside a compiled Qwen3 of transformers in the same shape",
        "– (the target is 1.3 times)",
    ),
}


def listing() -> str:
    """The checks in order, what each settles, and its minutes, as a Markdown table."""
    rows = [("check", "minutes", "settles", "expected")]
    rows += [(name, *PROTOCOL[name]) for name in CHECKS]
    head, *checks = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---|---|---|---|", *checks])


def run_checks(names: Sequence[str], bench: Bench) -> dict[str, list[Row]]:
    """Rows of each check, in the order of the protocol.

    Raises:
        ArchscaleError: there is no GPU and the sizes are not those for a CPU.
    """
    if not bench.cuda and not bench.tiny:
        raise ArchscaleError(
            "no CUDA device",
            "archscale bench gpu",
            "run it on a GPU, or see with --tiny that it runs on this CPU",
        )
    rows = {}
    for name in (n for n in CHECKS if n in names):
        bench.rows = []
        torch.manual_seed(0)
        CHECKS[name](bench)
        rows[name] = bench.rows
    return rows


def report(rows: Mapping[str, list[Row]], bench: Bench, *, as_json: bool) -> str:
    """What `archscale bench gpu` prints of its checks."""
    if as_json:
        return json.dumps({"machine": machine(bench.device), "checks": rows}, indent=1)
    tables = [f"\n## {name}\n\n{markdown(table)}" for name, table in rows.items()]
    return "\n".join([f"\n{machine(bench.device)}", *tables])
