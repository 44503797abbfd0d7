"""Triton kernels of the passes in `fused.py`: each is one launch over all parts of all tensors.

A program takes one row of a table, a chunk of one part, and finds its tensors in a table of
pointers; so a launch does not depend on how many parameters there are. A part is `rows` × `cols`
elements, counted row-major, fewer than 2³¹: element e lies at offset + e of a flat tensor, or at
offset + (e ÷ cols) · stride + e mod cols where rows lie apart (`ROWS`). Sums are in float32 within
a chunk and in float64 over chunks, always in the same order. `passes.Passes` is the reference.

Where all offsets, counts and addresses in bytes are multiples of 16, `ALIGN` says so, or is 1: what
is read from a table the compiler cannot know, and it would access number by number.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024  # elements that a program has in registers
# Columns of a table of chunks, int64; offsets, strides and counts in elements.
# `view` is of the optimizer's; `slot` is a place among partial sums, −1: not counted.
COLUMNS = (
    *("param", "here", "here_stride", "there", "there_stride"),
    *("cols", "start", "stop", "view", "slot"),
)
# Columns of the table of pointers by parameter: weight, gradient, moments of this step, moments in
# the state (others only where this rank has no gradient).
POINTERS = ("weight", "gradient", "first", "second", "state_first", "state_second")
WIDTH, ENDS = tl.constexpr(len(COLUMNS)), tl.constexpr(len(POINTERS))


@triton.jit
def _pointer(POINTERS, param, which: tl.constexpr, dtype: tl.constexpr):
    return tl.load(POINTERS + param * ENDS + which).to(tl.pointer_type(dtype))


@triton.jit
def _elements(row):
    """Columns of the part, and the elements of the chunk: first, and behind the last; int32."""
    cols, start, stop = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    return cols.to(tl.int32), start.to(tl.int32), stop.to(tl.int32)


@triton.jit
def _row(e, stride, cols, ROWS: tl.constexpr):
    """Where the row of element e begins, less what `_column` adds."""
    if ROWS:
        return (e // cols).to(tl.int64) * stride
    return tl.zeros_like(e).to(tl.int64)


@triton.jit
def _column(e, cols, ROWS: tl.constexpr):
    if ROWS:
        return e % cols
    return e


@triton.jit
def momentum_kernel(  # noqa: PLR0913
    TABLE,
    POINTERS,
    COEFFICIENTS,
    OUT,
    G_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """M ← μ M + G, and M̂ = μ M + G, or M, to its place in OUT.

    COEFFICIENTS: (μ, 1 for Nesterov) by parameter, float32. PACK: without it M̂ goes nowhere.
    """
    row = TABLE + tl.program_id(0).to(tl.int64) * WIDTH
    param = tl.load(row)
    here, here_stride = tl.load(row + 1), tl.load(row + 2)
    there, there_stride = tl.load(row + 3), tl.load(row + 4)
    cols, start, stop = _elements(row)
    G = _pointer(POINTERS, param, 1, G_TYPE) + here
    M = _pointer(POINTERS, param, 2, M_TYPE) + here
    mu, nesterov = tl.load(COEFFICIENTS + 2 * param), tl.load(COEFFICIENTS + 2 * param + 1)
    for low in range(start, stop, BLOCK):
        e = low + tl.arange(0, BLOCK)
        inside, column = tl.max_constancy(e < stop, ALIGN), _column(e, cols, ROWS)
        at = _row(e, here_stride, cols, ROWS) + column
        M_e = tl.multiple_of(M + at, ALIGN)
        g = tl.load(tl.multiple_of(G + at, ALIGN), mask=inside).to(tl.float32)
        m = (mu * tl.load(M_e, mask=inside).to(tl.float32) + g).to(M_TYPE)
        tl.store(M_e, m, mask=inside)
        if PACK:
            m = m.to(tl.float32)
            ahead = tl.where(nesterov > 0, mu * m + g, m).to(OUT.dtype.element_ty)
            to = there + _row(e, there_stride, cols, ROWS) + column
            tl.store(tl.multiple_of(OUT + to, ALIGN), ahead, mask=inside)


@triton.jit
def return_kernel(  # noqa: PLR0913
    TABLE,
    POINTERS,
    BACK,
    PARTIAL,
    W_TYPE: tl.constexpr,
    Q_TYPE: tl.constexpr,
    RATIO: tl.constexpr,
    UNPACK: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Q from its place in BACK into the memory of the gradient, and the chunk's part of ‖W‖², ‖Q‖²
    and ⟨W, Q⟩ into row `slot` of PARTIAL (slots, 3).

    RATIO: elements of Q that an element of the gradient has room for; each row of a part begins
    where that row of the gradient does. UNPACK: without it Q is there already.
    """
    row = TABLE + tl.program_id(0).to(tl.int64) * WIDTH
    param = tl.load(row)
    here, here_stride = tl.load(row + 1), tl.load(row + 2)
    there, there_stride = tl.load(row + 3), tl.load(row + 4)
    cols, start, stop = _elements(row)
    slot = tl.load(row + 9)
    W = _pointer(POINTERS, param, 0, W_TYPE) + here
    Q = _pointer(POINTERS, param, 1, Q_TYPE) + here * RATIO
    counted = tl.where(slot >= 0, stop, 0)  # W of the others is not read
    ww = tl.zeros((BLOCK,), tl.float32)
    qq = tl.zeros((BLOCK,), tl.float32)
    wq = tl.zeros((BLOCK,), tl.float32)
    for low in range(start, stop, BLOCK):
        e = low + tl.arange(0, BLOCK)
        inside, column = tl.max_constancy(e < stop, ALIGN), _column(e, cols, ROWS)
        begin = _row(e, here_stride, cols, ROWS)
        Q_e = tl.multiple_of(Q + (begin * RATIO + column), ALIGN)
        if UNPACK:
            place = there + _row(e, there_stride, cols, ROWS) + column
            came = tl.multiple_of(BACK + place, ALIGN)
            q = tl.load(came, mask=inside, other=0.0).to(Q_TYPE)
            tl.store(Q_e, q, mask=inside)
        else:
            q = tl.load(Q_e, mask=inside, other=0.0)
        W_e = tl.multiple_of(W + (begin + column), ALIGN)
        adds = tl.max_constancy(e < counted, ALIGN)
        w = tl.load(W_e, mask=adds, other=0.0).to(tl.float32)
        q = q.to(tl.float32)
        ww += w * w
        qq += q * q
        wq += w * q
    if slot >= 0:
        tl.store(PARTIAL + 3 * slot, tl.sum(ww))
        tl.store(PARTIAL + 3 * slot + 1, tl.sum(qq))
        tl.store(PARTIAL + 3 * slot + 2, tl.sum(wq))


@triton.jit
def sum_kernel(RANGES, PARTIAL, W, Q, P, BLOCK: tl.constexpr):
    """w, q and p of a view from its partial sums. RANGES: (view, first slot, slot behind the
    last) of each program, int64."""
    row = RANGES + 3 * tl.program_id(0)
    view, start, stop = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    w = tl.zeros((BLOCK,), tl.float64)
    q = tl.zeros((BLOCK,), tl.float64)
    p = tl.zeros((BLOCK,), tl.float64)
    for low in range(start, stop, BLOCK):
        at = low + tl.arange(0, BLOCK)
        inside = at < stop
        w += tl.load(PARTIAL + 3 * at, mask=inside, other=0.0).to(tl.float64)
        q += tl.load(PARTIAL + 3 * at + 1, mask=inside, other=0.0).to(tl.float64)
        p += tl.load(PARTIAL + 3 * at + 2, mask=inside, other=0.0).to(tl.float64)
    tl.store(W + view, tl.sum(w).to(tl.float32))
    tl.store(Q + view, tl.sum(q).to(tl.float32))
    tl.store(P + view, tl.sum(p).to(tl.float32))


@triton.jit
def update_kernel(  # noqa: PLR0913
    TABLE,
    POINTERS,
    KEEP,
    APPLY,
    BAD,
    W_TYPE: tl.constexpr,
    Q_TYPE: tl.constexpr,
    FIRST_TYPE: tl.constexpr,
    SECOND_TYPE: tl.constexpr,
    SECOND: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W ← keep · W − apply · Q; where a view is bad, its moments become zero instead.

    KEEP, APPLY, BAD: by view. SECOND: whether there is a second moment.
    """
    row = TABLE + tl.program_id(0).to(tl.int64) * WIDTH
    param, view = tl.load(row), tl.load(row + 8)
    here, here_stride = tl.load(row + 1), tl.load(row + 2)
    cols, start, stop = _elements(row)
    W = _pointer(POINTERS, param, 0, W_TYPE) + here
    Q = _pointer(POINTERS, param, 1, Q_TYPE) + here * RATIO
    first = _pointer(POINTERS, param, 4, FIRST_TYPE) + here
    second = _pointer(POINTERS, param, 5, SECOND_TYPE) + here
    bad, keep, apply = tl.load(BAD + view), tl.load(KEEP + view), tl.load(APPLY + view)
    moved = tl.where(bad == 0, stop, 0)  # 0 · NaN is NaN: Q is not read
    dropped = tl.where(bad == 0, 0, stop)
    for low in range(start, stop, BLOCK):
        e = low + tl.arange(0, BLOCK)
        column = _column(e, cols, ROWS)
        begin = _row(e, here_stride, cols, ROWS)
        at = begin + column
        good, reset = tl.max_constancy(e < moved, ALIGN), e < dropped
        W_e = tl.multiple_of(W + at, ALIGN)
        w = tl.load(W_e, mask=good).to(tl.float32)
        Q_e = tl.multiple_of(Q + (begin * RATIO + column), ALIGN)
        q = tl.load(Q_e, mask=good).to(tl.float32)
        tl.store(W_e, (keep * w - apply * q).to(W_TYPE), mask=good)
        zero = tl.zeros((BLOCK,), tl.float32)
        tl.store(first + at, zero.to(FIRST_TYPE), mask=reset)
        if SECOND:
            tl.store(second + at, zero.to(SECOND_TYPE), mask=reset)


@triton.jit
def adam_kernel(  # noqa: PLR0913
    TABLE,
    POINTERS,
    CORRECTIONS,
    lr,
    keep,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    M_TYPE: tl.constexpr,
    V_TYPE: tl.constexpr,
    UPDATE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adam's moments and its Q = m̂ / (√v̂ + ε): W ← keep · W − lr · Q, where what is not finite in
    the gradient counts as zero (`UPDATE`), or Q in the memory of the gradient.

    CORRECTIONS: (1 − β₁ᵗ, √(1 − β₂ᵗ)) by parameter, float32.
    """
    row = TABLE + tl.program_id(0).to(tl.int64) * WIDTH
    param, here = tl.load(row), tl.load(row + 1)
    _, start, stop = _elements(row)
    W = _pointer(POINTERS, param, 0, W_TYPE) + here
    G = _pointer(POINTERS, param, 1, G_TYPE) + here
    M = _pointer(POINTERS, param, 2, M_TYPE) + here
    V = _pointer(POINTERS, param, 3, V_TYPE) + here
    first, second = tl.load(CORRECTIONS + 2 * param), tl.load(CORRECTIONS + 2 * param + 1)
    for low in range(start, stop, BLOCK):
        e = low + tl.arange(0, BLOCK)
        inside = tl.max_constancy(e < stop, ALIGN)
        W_e, G_e = tl.multiple_of(W + e, ALIGN), tl.multiple_of(G + e, ALIGN)
        M_e, V_e = tl.multiple_of(M + e, ALIGN), tl.multiple_of(V + e, ALIGN)
        g = tl.load(G_e, mask=inside, other=0.0).to(tl.float32)
        if UPDATE:
            g = tl.where(tl.abs(g) < float("inf"), g, 0.0)  # NaN is not smaller either
        m = tl.load(M_e, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(V_e, mask=inside, other=0.0).to(tl.float32)
        m = (m + one_minus_beta1 * (g - m)).to(M_TYPE)
        v = (beta2 * v + one_minus_beta2 * g * g).to(V_TYPE)
        tl.store(M_e, m, mask=inside)
        tl.store(V_e, v, mask=inside)
        q = m.to(tl.float32) / (tl.sqrt(v.to(tl.float32)) / second + eps) / first
        if UPDATE:
            w = tl.load(W_e, mask=inside, other=0.0).to(tl.float32)
            tl.store(W_e, (keep * w - lr * q).to(W_TYPE), mask=inside)
        else:
            tl.store(G_e, q.to(G_TYPE), mask=inside)
