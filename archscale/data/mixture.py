"""Which source of a mixture each training sample is read from: a pure function of the weights and
the sample's number.

Source k has `q_k` of every `P = Σ q` samples, so that any P consecutive samples have exactly these
proportions. Within a period its j-th sample stands at the ideal time `(j + 1/2) / q_k`, and the
samples of all sources follow each other in the order of these times: the sequence of Webster and
Sainte-Laguë. Between the times of two samples, at time t, every source has had `q_k t + e_k`
samples with |e_k| ≤ 1/2; so the first n samples have `n w_k` of source k, give or take
`(1 - w_k) / 2 + w_k (K - 1) / 2 = 1/2 + w_k (K - 2) / 2` for K sources of shares w_k, and any
window, the difference of two beginnings, is at most twice as far off: one sample with two sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from archscale.errors import ConfigError

LONGEST_PERIOD = 2**20


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Samples of each source in a period, sorted by name.

    Proportions are exact, each weight taken as the decimal number that it is written as, where
    their period is at most 2^20. Otherwise 2^20 samples are shared out by largest remainder, which
    is off by less than one sample in a period.

    Args:
        weights: positive, by name; only their proportions count.

    Raises:
        ConfigError: a weight that would get no sample in 2^20.
    """
    exact = {name: Fraction(repr(weights[name])) for name in sorted(weights)}
    total = sum(exact.values())
    shares = {name: weight / total for name, weight in exact.items()}
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period > LONGEST_PERIOD:
        period = LONGEST_PERIOD
    parts = {name: math.floor(share * period) for name, share in shares.items()}
    short = sorted(shares, key=lambda name: parts[name] - shares[name] * period)
    for name in short[: period - sum(parts.values())]:
        parts[name] += 1
    for name, part in parts.items():
        if part == 0:
            raise ConfigError(
                f"weight {weights[name]:g} of source {name} is less than one sample in {period:,}",
                "data.mixture",
                f"leave {name} out, or raise its weight to at least"
                f" {float(total / period) * 1.1:.2g}",
            )
    return parts


class Order:
    """The source of every sample, and its number among that source's own.

    Args:
        quotas: samples of each source in a period; of samples at the same ideal time the source
            that is named first comes first.

    Attributes:
        period: P.
    """

    def __init__(self, quotas: Mapping[str, int]):
        parts = list(quotas.values())
        self.period = sum(parts)
        self._quotas = np.array(parts, np.int64)
        own = np.concatenate([np.arange(part, dtype=np.int32) for part in parts])
        # Correctly rounded quotients of integers this small are equal where the fractions are.
        times = (2 * own + 1) / np.repeat(self._quotas, parts)
        by_time = np.argsort(times, kind="stable")
        source = np.repeat(np.arange(len(parts), dtype=np.min_scalar_type(len(parts))), parts)
        self._source, self._own = source[by_time], own[by_time]

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places of the sources among the quotas, int64 [n], and the samples' numbers among
        their source's own, int64 [n].

        Args:
            numbers: sample numbers, int64 [n], not negative.
        """
        periods, position = np.divmod(numbers, np.int64(self.period))
        source = self._source[position].astype(np.int64)
        return source, periods * self._quotas[source] + self._own[position]
