"""Heat maps: a table of rows over steps as a small PNG inside an SVG, in colors that also order in
print."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from archscale.report.charts import Axis, event_marks, figure, x_labels
from archscale.report.scale import Scale, number

LEVELS = 255
_ANCHORS = (
    "440154",
    "472c7a",
    "3b528b",
    "2c728e",
    "21918c",
    "28ae80",
    "5ec962",
    "addc30",
    "fde725",
)  # viridis


def _palette() -> bytes:
    anchors = np.array([[int(color[i : i + 2], 16) for i in (0, 2, 4)] for color in _ANCHORS])
    at = np.linspace(0, len(anchors) - 1, LEVELS)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8).tobytes()


PALETTE = _palette()  # LEVELS × (red, green, blue)


def png(levels: np.ndarray) -> bytes:
    """A PNG of (rows, columns) levels: 0 is transparent, 1 … LEVELS are the palette."""
    rows, count = levels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in levels.astype(np.uint8))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", count, rows, 8, 3, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"PLTE", b"\0\0\0" + PALETTE),
            chunk(b"tRNS", b"\0"),
            chunk(b"IDAT", zlib.compress(raw, 9)),
            chunk(b"IEND", b""),
        ]
    )


def to_levels(table: np.ndarray, scale: Scale) -> np.ndarray:
    """1 … LEVELS by where values lie on the scale; 0 where there is none."""
    with np.errstate(invalid="ignore"):
        share = np.clip(scale.fraction(table), 0, 1)
    return np.where(np.isfinite(share), 1 + np.rint(np.nan_to_num(share) * (LEVELS - 1)), 0).astype(
        np.uint8
    )


def heat_map(
    title: str,
    definition: str,
    key: str,
    names: Sequence[str],
    bands: Sequence[tuple[str, int]],
    table: np.ndarray,
    axis: Axis,
    scale: Scale,
    *,
    steps: tuple[int, int],
    run: int,
    tallest: int,
) -> str:
    """A figure.

    Args:
        names: what stands in place of `*` in `key`, one for each row.
        bands: (label, number of rows) from top to bottom.
        table: (rows, columns), columns of equal width over `steps`, first and last.
        axis: of steps; may reach farther than the table, so that maps line up with curves and other
            runs.
        tallest: most pixels of height.
    """
    rows = len(table)
    start, width = axis.box
    tall = min(tallest, max(4 * 16, rows * (14 if rows <= 12 else 8)))
    image = base64.b64encode(png(to_levels(table, scale))).decode()
    above = np.cumsum([0, *(count for _, count in bands)])
    kinds = any(count > 1 for _, count in bands)  # rows one by one need no line between them
    edges = "".join(f"M{start} {at}h{width}" for at in above[1:-1]) if kinds else ""
    svg = (
        f'<svg class="heat" data-x="step" data-run="{run}" data-lo="{scale.lo!r}"'
        f' data-hi="{scale.hi!r}"{" data-log" if scale.log else ""} viewBox="{start} 0 {width}'
        f' {rows}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}, {rows} rows'
        f' by steps" style="height:{tall}px"><image x="{steps[0]}" y="0"'
        f' width="{max(1, steps[1] - steps[0])}" height="{rows}" preserveAspectRatio="none"'
        f' href="data:image/png;base64,{image}"/><path class="edge"'
        f' d="{edges}"/>{event_marks(axis, rows)}</svg>'
    )
    labels = "".join(
        f'<span title="{escape(label)}"'
        f' style="top:{100 * (at + count / 2) / rows:.4g}%">{escape(label)}</span>'
        for (label, count), at in zip(bands, above)
    )
    legend = (
        f'<span class="bar">{number(scale.lo, 3)}<i></i>{number(scale.hi, 3)}'
        f"{' (log)' if scale.log else ''}</span>"
    )
    ticks = x_labels(axis.scale.ticks(4), axis.scale, "steps")
    plot = f'<div class="ys" style="height:{tall}px">{labels}</div>{svg}{ticks}'
    widest = max(len(label) for label, _ in bands)
    joined = escape(" ".join(names))
    return figure(
        title,
        definition,
        key,
        legend,
        plot,
        "map",
        f' data-rows="{joined}" style="--label:{widest}"',
    )
