"""Heat maps: a table of rows over steps as a small image, in colors that also order in print."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from archscale.report.scale import FLAT, Scale, columns, number

COLORMAP = "viridis"
LEVELS = 218  # the most of which no two have one color in 8 bits, so that values can be read back
TALLEST = 480  # pixels
UNIT = Scale(0.0, 1.0)


@dataclass(frozen=True)
class HeatMap:
    """A figure.

    Attributes:
        key: of metrics.jsonl, with `*` in place of each of `names`, one a row.
        bands: (label, number of rows) from top to bottom.
        table: (rows, n), at `steps` (n,); as drawn, in columns of equal width from the first to the
            last.
        tallest: most pixels of height.
    """

    key: str
    run: int
    title: str
    definition: str
    names: Sequence[str]
    bands: Sequence[tuple[str, int]]
    table: np.ndarray
    steps: np.ndarray
    tallest: int = TALLEST
    scale: Scale = UNIT

    @property
    def constant(self) -> str:
        """Its value if it has only one."""
        finite = self.table[np.isfinite(self.table)]
        if not len(finite):
            return "none"
        return number(float(finite[0])) if np.ptp(finite) <= FLAT * np.abs(finite).max() else ""

    @property
    def ends(self) -> tuple[int, int]:
        """First and last step."""
        return int(self.steps[0]), int(self.steps[-1])

    def drawn(self, count: int, scale: Scale) -> HeatMap:
        """In at most `count` columns."""
        return replace(self, table=columns(self.table, self.steps, count), scale=scale)

    @property
    def height(self) -> int:
        """In pixels."""
        rows = len(self.table)
        return min(self.tallest, max(64, rows * (14 if rows <= 12 else 8)))

    @property
    def labels(self) -> list[tuple[str, float]]:
        """Each band's, with the per cent of the height at which it stands."""
        ends = np.cumsum([count for _, count in self.bands])
        return [
            (label, 100 * (end - count / 2) / len(self.table))
            for (label, count), end in zip(self.bands, ends.tolist())
        ]

    @property
    def edges(self) -> list[float]:
        """Where bands of several rows meet, in per cent of the height."""
        if all(count == 1 for _, count in self.bands):
            return []
        ends = np.cumsum([count for _, count in self.bands])
        return (100 * ends[:-1] / len(self.table)).tolist()

    @property
    def label_width(self) -> int:
        """In letters."""
        return max(len(label) for label, _ in self.bands)

    @property
    def bounds(self) -> tuple[str, str]:
        """Lowest and highest value of the colors."""
        return number(self.scale.lo, 3), number(self.scale.hi, 3)

    @property
    def image(self) -> str:
        """The address of the image: lossless WebP, transparent where there is no value."""
        from matplotlib import colormaps
        from matplotlib.image import imsave

        shares = np.ma.masked_invalid(self.scale.fraction(self.table))
        pixels = colormaps[COLORMAP].resampled(LEVELS)(shares, bytes=True)
        stream = io.BytesIO()
        imsave(stream, pixels, format="webp", pil_kwargs={"lossless": True, "method": 2})
        return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def palette() -> str:
    """The colors of all levels from the lowest on, in hexadecimal, for the read-out of values."""
    from matplotlib import colormaps

    colors = colormaps[COLORMAP].resampled(LEVELS)(np.arange(LEVELS), bytes=True)
    return colors[:, :3].tobytes().hex()
