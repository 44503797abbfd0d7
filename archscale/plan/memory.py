"""Bytes that a training step holds and sends, from the model's structure: what is planned before a
run.

Memory is what the eager transformer saves for its backward pass, operation by operation, what the
layout holds, and what is alive at each moment that can be the fullest (`Memory.phases`). Compiled
blocks save less; a compiled loss is planned as such. An accelerator's allocator adds fragmentation
and the libraries' own buffers, which are not counted.

Per token: D width, H query heads, G key-value heads, K head size, F hidden size; V vocabulary, T
context, B sequences of a micro-batch, N = B T tokens, L blocks, E experts; c bytes of an activation
(bf16 2, fp32 4).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from archscale.plan.counting import Weight, vocabulary, weights
from archscale.rules import Views

if TYPE_CHECKING:
    from archscale.config import ModelConfig

FP32 = 4
# what the loss takes at a time, `loss.chunk_tokens`: logits on a CPU, tokens elsewhere
LOSS_LOGITS, LOSS_TOKENS = 1 << 22, 4096
ZERO_BUCKET = 1 << 25  # gradient elements that DeepSpeed reduces at a time, `deepspeed_json.BUCKET`
ZERO_PERSISTENT = 100_000  # elements up to which ZeRO-3 keeps a parameter gathered
# elements of whole matrices that a rank orthogonalizes at a time, `shards.MAX_BATCH_ELEMENTS`
EXCHANGE_BATCH = 1 << 25
# Float32 momentum of matrices, AdamW elsewhere.
STATE_BYTES = {"matrix": 4, "embedding": 8, "head": 8, "vector": 8}

Engine = Literal["native", "deepspeed"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        terms: what each thing takes where it takes most.
        phases: what is alive at once; loss (end of the forward pass), backward_start (the loss),
            backward_first (the last block), backward_last (the first block), backward_end (the
            embedding), optimizer.
    """

    terms: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())


@dataclass(frozen=True)
class Execution:
    """How a training step runs: its numerics, its micro-batches, and which rank holds what.

    Expert groups divide the experts; the rest of sharding divides rows.

    Attributes:
        micro_batch: sequences per forward pass.
        accumulation: forward passes per step.
        engine, replicate, shard, expert, zero_stage, reshard_after_forward: as in the `parallel`
            section; world size is replicate × shard.
        recompute: only the blocks' inputs are kept for the backward pass.
        document_mask: attention has a mask of its own per sequence, and all blocks the same.
        offload: float32 masters, optimizer state and the update are in host memory, which is not
            counted (DeepSpeed).
        state_bytes: optimizer state per element, by role.
        orthogonal: roles whose rule orthogonalizes whole matrices. views: which matrices these are.
        compute_bytes, wire_bytes: per element, of the orthogonalization and of its exchange; None:
            by precision.
        ema: a running average of the weights lies beside them.
        watched: as on steps that telemetry reads: whole matrices are kept beside their directions.
        compiled: the loss overwrites its logits with their gradient in one pass.
        on_cpu: it runs there, where the loss takes fewer tokens at a time.
    """

    precision: Precision
    micro_batch: int
    accumulation: int = 1
    engine: Engine = "native"
    replicate: int = 1
    shard: int = 1
    expert: int = 1
    zero_stage: int = 1
    reshard_after_forward: bool = True
    recompute: bool = False
    document_mask: bool = False
    offload: bool = False
    state_bytes: Mapping[str, int] = field(default_factory=lambda: STATE_BYTES)
    orthogonal: Collection[str] = ("matrix",)
    views: Views = field(default_factory=Views)
    compute_bytes: int | None = None
    wire_bytes: int | None = None
    watched: bool = True
    ema: bool = False
    compiled: bool = False
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if self.shard % self.expert:
            raise ValueError(
                f"expert {self.expert} does not divide shard {self.shard}: set it to a divisor"
            )

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of an activation."""
        return 2 if self.precision == "bf16" else FP32

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of an element that the optimizer sends."""
        return self.wire_bytes or self.element_bytes

    @property
    def world(self) -> int:
        return self.replicate * self.shard

    @property
    def is_ddp(self) -> bool:
        return self.engine == "native" and self.shard == 1 and self.world > 1

    @property
    def gathers(self) -> bool:
        """Whether parameters are gathered where they are used: FSDP2, HSDP, ZeRO-3."""
        return self.world > 1 and (
            self.zero_stage == 3 if self.engine == "deepspeed" else self.shard > 1
        )

    def ways(self, w: Weight) -> int:
        """Ranks over which a weight (of an expert group) is sharded."""
        ways = self.world if self.engine == "deepspeed" else self.shard
        return ways // self.expert if w.part == "experts" else ways

    def whole(self, w: Weight) -> int:
        """Elements of all copies that the first expert group has."""
        return w.elements // w.shape[0] * self._rows(w)

    def part(self, w: Weight) -> int:
        """Elements of all copies that the first rank stores: by ceiling, so no rank has more."""
        if self.engine == "deepspeed":  # flat
            return math.ceil(self.whole(w) / self.ways(w))
        return w.elements // w.shape[0] * math.ceil(self._rows(w) / self.ways(w))

    def _rows(self, w: Weight) -> int:
        return math.ceil(w.shape[0] / self.expert) if w.part == "experts" else w.shape[0]


def memory(model: ModelConfig, step: Execution) -> Memory:
    """Bytes on the fullest rank over a training step.

    Measured on CPU: for one process, DDP and FSDP2 to a few per cent; for DeepSpeed what stays
    between steps to 5 %, the fullest moment to about 25 %. Expert parallelism is taken with equal
    loads.
    """
    engine, zero_stage, micro_batch = step.engine, step.zero_stage, step.micro_batch
    reshard_after_forward, recompute = step.reshard_after_forward, step.recompute
    c, state_bytes = step.element_bytes, step.state_bytes
    V, D, L, N = vocabulary(model), model.width, model.depth, micro_batch * model.context
    stored = weights(model)
    part, whole = ({w.name: elements(w) for w in stored} for elements in (step.part, step.whole))
    local, block = sum(part.values()), sum(whole[w.name] for w in stored if w.in_blocks) // L
    root, table = sum(whole[w.name] for w in stored if not w.in_blocks), V * D
    zero = engine == "deepspeed"
    # another of DeepSpeed's classes: float32 gradients that stay
    fused = zero and zero_stage == 1 and c < FP32
    parameters = sum(whole.values())
    sharded_gradients = step.gathers or (zero and zero_stage > 1)
    # A weight that is float32 where it is used is cast there, and the cast is saved; FSDP2 and ZeRO
    # hold bf16 instead.
    casts = int(c < FP32 and not zero and not step.gathers)
    cast = casts * c * sum(whole[w.name] for w in stored if w.role == "matrix") // L

    # What the blocks save, and what their backward pass holds on top of it: gradients of the
    # residual stream, of a branch and of the hidden features, less what they have already freed.
    stream, saved = FP32 * D * N, block_activations(model, c, micro_batch, step.expert > 1)
    hidden = N * c * model.mlp_hidden * (2 if model.mlp == "swiglu" else 3)
    backward = stream + N * c * D + hidden
    # One mask of attention for all blocks.
    masks = micro_batch if step.document_mask else 1 if model.window else 0
    mask = masks * c * model.context**2
    # The loss: gradients of its input and of the head are taken in the forward pass. Logits exist
    # by chunks, in float32 beside their softmax, or compiled as they are.
    logits = (c if step.compiled else 2 * FP32) * V * loss_tokens(N, V, step.on_cpu)
    head_input, loss = c * D * N, c * D * N + FP32 * table
    # The backward pass scales both, and rounds the head's; a CPU holds it in float32 meanwhile.
    scaled = head_input + (c if c < FP32 else 0) * table
    scaled += FP32 * table * (c == FP32 or step.on_cpu)

    terms = {
        "parameters": FP32 * local,  # with DeepSpeed the float32 masters
        "model_copy": zero * c * (local if zero_stage == 3 else sum(whole.values())),
        "weight_average": step.ema * FP32 * local,
        "optimizer_state": sum(state_bytes[w.role] * part[w.name] for w in stored),
        "gradients": FP32 * (local if sharded_gradients or not zero else sum(whole.values())),
        "cast_weights": cast * (1 if recompute else L),
        "activations": (
            mask + L * (stream if recompute else saved) + stream + N * (FP32 + head_input // N + 16)
        ),
        "backward": backward + (saved - stream if recompute else 0),
        "loss": loss + max(head_input + logits + casts * c * table, scaled),
        # Two blocks at a time (one in use, one arriving), or all; embedding and head throughout.
        "gathered": (
            step.gathers * c * (root + block * (min(2, L) if reshard_after_forward or zero else L))
        ),
        # Gradients of one block or of embedding and head, and their float32 copy that travels.
        "reduction": sharded_gradients * (c + FP32) * max(block, root),
        # DeepSpeed's: where gradients wait for their reduction, and small parameters that ZeRO-3
        # does not free.
        "bucket": (
            zero * min(ZERO_BUCKET, parameters) * (FP32 if zero_stage == 3 else 0 if fused else c)
        ),
        "persistent": (
            step.gathers
            * zero
            * c
            * sum(whole[w.name] for w in stored if w.numel <= ZERO_PERSISTENT)
        ),
        "optimizer_buffers": _optimizer_buffers(stored, step, max(part[w.name] for w in stored)),
    }
    if step.offload:
        on_host = ("parameters", "weight_average", "optimizer_state", "optimizer_buffers")
        terms |= dict.fromkeys(on_host, 0)
    gradients, gathered = terms["gradients"], terms["gathered"]
    kept_always = ("parameters", "weight_average", "model_copy", "optimizer_state")
    fixed = sum(terms[name] for name in kept_always)
    resident = step.is_ddp or fused or (zero and zero_stage == 3)
    if resident:  # gradients, or the buckets that they are views of, are there all the time
        fixed, gradients = fixed + gradients, 0
    if zero and zero_stage == 3:
        fixed += terms["bucket"] + terms["persistent"]
    bucket = terms["bucket"] if zero_stage < 3 else 0
    kept = gradients if step.accumulation > 1 or zero else 0  # from earlier micro-batches
    # a new gradient lies beside where it is summed
    collected = step.is_ddp or sharded_gradients or kept > 0
    fresh = (
        FP32 * max(w.numel for w in stored if w.in_blocks)
        if collected and not sharded_gradients
        else 0
    )
    reducing = sharded_gradients * (c + FP32) * block
    head_gradient = c * root if sharded_gradients else 0 if collected else FP32 * table
    embedding_last = 0 if collected or model.tied_embeddings else FP32 * table
    # A cast is freed before its weight's float32 gradient exists: the first block never holds
    # all of both.
    lag = (
        _lag(
            [FP32 * whole[w.name] // L for w in stored if w.in_blocks and w.role == "matrix"],
            c / FP32,
        )
        if casts and not collected
        else 0
    )
    base = fixed + kept + terms["cast_weights"] + terms["activations"] + gathered
    phases = {
        "loss": base + loss + head_input + logits + casts * c * table,
        "backward_start": base + loss + scaled,
        "backward_first": base + terms["backward"] + head_gradient + fresh + reducing + bucket,
        "backward_last": (
            fixed
            + gradients
            - embedding_last
            + mask
            + cast
            - lag
            + saved
            + backward
            + fresh
            + reducing
            + step.gathers * c * (root + min(2, L) * block)
            + sharded_gradients * c * table
            + bucket
        ),
        "backward_end": (
            fixed
            + gradients
            + 2 * stream
            + (0 if embedding_last or sharded_gradients else FP32 * table)
            + step.gathers * c * root
            + sharded_gradients * (c + FP32) * root
            + bucket
        ),
        "optimizer": (
            fixed
            + (FP32 * local * (not fused and not step.offload) if zero else gradients)
            + terms["optimizer_buffers"]
        ),
    }
    return Memory(terms, phases)


def loss_tokens(tokens: int, vocabulary: int, on_cpu: bool) -> int:
    """Tokens whose logits exist at a time, of a micro-batch's."""
    if on_cpu:
        return max(1, min(tokens, LOSS_LOGITS // vocabulary))
    return math.ceil(tokens / max(1, tokens // LOSS_TOKENS))


def block_activations(model: ModelConfig, c: int, micro_batch: int, spread: bool = False) -> int:
    """Bytes that one block saves for its backward pass in eager mode; c bytes of an activation.
    spread: experts are, over ranks, and each receives as many rows as it sends."""
    D, H, G, K, T = model.width, model.heads, model.kv_heads, model.head_dim, model.context
    gated, norm, E, k = int(model.gated_attention), int(model.qk_norm), *model.expert_counts
    # Two norms: their input, 1/RMS, the result without and with the weight.
    token = 2 * (FP32 * D + FP32 + 2 * c * D)
    token += c * ((H + 2 * G) * K + gated * H)  # the fused projection
    # 1/RMS, the result, a float32 input
    token += norm * (H + G) * (FP32 + c * K + (FP32 * K if c < FP32 else 0))
    # rotated q and k; the output and its log-sum-exp
    token += c * (H + G) * K + c * H * K + FP32 * H
    token += gated * c * (H + H * K)  # the gate's sigmoid and the gated output
    # up, its activation, their product
    token += c * model.mlp_hidden * (4 if model.mlp == "swiglu" else 2)
    router = 0
    if model.moe is not None:
        # experts' inputs, gated hidden features, gates
        token += k * c * (D + model.mlp_hidden // model.moe.top_k + 1)
        token += 2 * FP32 * E + 2 * FP32 * k  # softmax of all logits, twice; of the chosen ones
        # int64: which are chosen, and the rows' order, there and back, here and elsewhere
        token += (3 + 2 * spread) * 8 * k
        # Float32 copies of the router's input and weight; the input itself is for the shared expert
        # alone.
        if c < FP32:
            router = (
                FP32 * D * (micro_batch * T + E)
                - (not model.moe.shared_expert) * c * D * micro_batch * T
            )
    rope = 0 if c == FP32 else 4 * c * T * K // 2  # casts of the tables
    return micro_batch * T * token + router + rope


def _lag(gradients: list[int], cast: float) -> int:
    """Bytes by which a block's gradients and casts stay below their sum in its backward pass.

    While one matrix holds both, those before it have only their casts and those after it only
    their gradients.

    Args:
        gradients: bytes of the float32 gradients of the block's matrices, in forward order.
        cast: bytes of a cast, as a share of its gradient's.
    """
    return min(
        round(sum(gradients[:i]) + cast * sum(gradients[i + 1 :])) for i in range(len(gradients))
    )


def _optimizer_buffers(stored: list[Weight], step: Execution, largest: int) -> int:
    """What `MatrixOptimizer.step` holds at its fullest: two exchange batches and an
    orthogonalization, or a temporary.

    Args:
        largest: elements of the largest part of a parameter that a rank stores.
    """
    compute, wire = (step.compute_bytes or step.element_bytes), step.exchanged_bytes
    watched = step.watched
    shapes: dict[tuple[int, int], int] = {}
    for w in stored:
        if w.role in step.orthogonal:
            for count, rows, cols in w.matrices(step.views):
                shapes[rows, cols] = shapes.get((rows, cols), 0) + count
    temporary = FP32 * largest  # √v of Adam; W ∘ Q of fused matrices of equal shape
    if not shapes:
        return temporary
    inward, outward = _exchanged(stored, step)  # of all batches and all ranks, in elements
    owned = sum(count * m * n for (m, n), count in shapes.items()) / step.world
    batches = math.ceil(max(owned, outward / step.world) / EXCHANGE_BATCH)
    batches = max(1, min(batches, math.ceil(sum(shapes.values()) / step.world)))
    batch = max(owned / batches, *(m * n for m, n in shapes))
    work = 0.0
    for (m, n), count in shapes.items():
        stack = max(1, min(math.ceil(count / step.world), batch // (m * n)))
        short, long = sorted((m, n))
        # The iteration: X, a spare one unless the stage serves, and square matrices; before it, two
        # float32 copies, unless a kernel scales.
        squares = 5 if compute == FP32 and 2 * long > 3 * short else 3
        iterating = compute * (m * n * (1 + (wire != compute)) + squares * short * short)
        # A watch keeps M̂, and takes inner products in float32.
        watching = watched * m * n * (wire + FP32 * (3 if wire < FP32 else 1))
        work = max(
            work,
            stack * (watched * wire * m * n + max(2 * FP32 * m * n, iterating)),
            stack * watching,
        )
    sent, back = inward / step.world / batches, outward / step.world / batches
    # While it works on one batch, the next one's momentum has arrived and the last one's directions
    # are under way; when it returns one, the stage of the last one is still there.
    orthogonalizing = (
        wire * (batch + sent * (2 if batches == 1 else 1) + (batches > 1) * 2 * back) + work
    )
    returning = wire * (batch * min(2, batches) + 2 * back + (batches > 1) * sent)
    return math.ceil(max(temporary, orthogonalizing, returning))


def _exchanged(stored: list[Weight], step: Execution) -> tuple[float, float]:
    """Elements that all ranks together send to the owners of matrices, and that these send back to
    every holder.

    A matrix that one rank of each replica holds whole is orthogonalized there; of another its owner
    holds 1 / shards, on average. ZeRO cuts its flat partitions anywhere, so that is an upper bound
    there.
    """
    inward = outward = 0.0
    for w in stored:
        if w.role not in step.orthogonal:
            continue
        ways = step.world if step.engine == "deepspeed" else step.shard
        copies = step.world // ways
        *_, rows, cols = w.shape
        chunk = (
            math.ceil(w.stack * rows / ways) if w.stack == 1 else math.ceil(w.stack / ways) * rows
        )
        for index in range(w.stack):
            start = index * rows
            for _, size in w.blocks or (("", rows),):
                whole = start // chunk == (start + size - 1) // chunk
                own = size * cols * (1.0 if whole else 1 / ways)
                inward += w.copies * (size * cols - own)
                outward += w.copies * (copies * size * cols - own)
                start += size
    return inward, outward


def communication(model: ModelConfig, step: Execution) -> dict[str, int]:
    """Bytes that a rank sends in one optimizer step, on average over ranks, by purpose; ring
    collectives.

    parameters: all-gathers for the forward pass, and for the backward pass of blocks that were
    freed; FSDP2 keeps the last one. gradients: float32, scattered at every micro-batch, by ZeRO-1
    once; added up over the replicas of a shard once. optimizer:
    momentum to the owners of matrices and directions back. experts: rows to their experts and back,
    with equal loads; one gate a row left out.
    """
    c, accumulation, expert = step.element_bytes, step.accumulation, step.expert
    stored = weights(model)
    sent = dict.fromkeys(("parameters", "gradients", "optimizer", "experts"), 0.0)
    world, zero = step.world, step.engine == "deepspeed"
    for w in stored:
        elements, ways = step.whole(w), step.ways(w)
        copies = world // (ways * (expert if w.part == "experts" else 1))  # replicas of each shard
        ring, over_replicas = (ways - 1) / ways, (copies - 1) / copies
        if step.gathers:
            times = 1.0
            if w.in_blocks and (step.reshard_after_forward or zero):
                times = 2 if zero else 2 - 1 / model.depth
            sent["parameters"] += accumulation * times * c * elements * ring
        elif zero:  # the updated model copy
            sent["parameters"] += c * elements * ring
        scatters = 1 if zero and step.zero_stage == 1 else accumulation
        sums = scatters if zero else 1
        sent["gradients"] += FP32 * elements * (scatters * ring + 2 * sums * over_replicas / ways)
    sent["optimizer"] = step.exchanged_bytes * sum(_exchanged(stored, step)) / world
    tokens = step.micro_batch * model.context * model.expert_counts[1] * (1 - 1 / expert)
    # There and back, in the forward and the backward pass.
    passes = accumulation * (6 if step.recompute else 4)
    if model.moe and model.moe.counts_first:
        passes += 2 * (accumulation - 1)  # the counting pass
    sent["experts"] = model.depth * passes * c * model.width * tokens
    return {purpose: round(size) for purpose, size in sent.items()}


def checkpoint_bytes(
    model: ModelConfig, state_bytes: Mapping[str, int] = STATE_BYTES, ema: bool = False
) -> int:
    """Float32 weights, with `ema` their running average too, and optimizer state on disk, over all
    ranks; two scalars per matrix and file headers left out."""
    each = FP32 * (2 if ema else 1)
    return sum((each + state_bytes[w.role]) * w.elements for w in weights(model))
