"""Bowls of several seeds: shifts of whole bowls do not blur the optimum, and are part of what is
unknown of the minimum."""

import numpy as np
import pytest

from archscale.errors import ConfigError, DataError
from archscale.fit.fit import Settings, fit
from archscale.fit.groups import FitRequest, fit_table
from archscale.fit.laws import ShiftedQuadratic
from archscale.fit.table import Table

X = np.array([0.01, 0.02, 0.04] * 3)
SEEDS = np.repeat([0, 1, 2], 3)


def draw(generator, noise=0.002, shift=0.05):
    """Optimum 0.022, minimum 3, curvature 0.1."""
    return (
        3
        + 0.1 * np.log(X / 0.022) ** 2
        + generator.normal(0, shift, 3)[SEEDS]
        + generator.normal(0, noise, 9)
    )


def fit_blocks(x, y, blocks, settings, where, names=("x", "y"), block="block"):
    return fit(
        "quadratic_log", x, y, settings, blocks=blocks, block=block, where=where, names=names
    )


def test_the_optimum_is_that_of_the_bowls_without_their_shifts():
    y = draw(np.random.default_rng(0))
    centred = y - np.array([y[s == SEEDS].mean() for s in range(3)])[SEEDS]
    found = fit_blocks(X, y, SEEDS, Settings(), "here").estimates
    assert found["optimum"].value == pytest.approx(
        fit("quadratic_log", X, centred).estimates["optimum"].value, rel=1e-9
    )
    blurred = fit("quadratic_log", X, y).estimates
    assert found["optimum"].value == pytest.approx(
        blurred["optimum"].value, rel=1e-9
    )  # every seed has the same rates
    wide, narrow = (np.log(e["optimum"].high / e["optimum"].low) for e in (blurred, found))
    assert narrow < wide / 5
    assert found["minimum"].value == pytest.approx(blurred["minimum"].value, rel=1e-9)
    assert found["minimum"].high - found["minimum"].low > 1.5 * (
        blurred["minimum"].high - blurred["minimum"].low
    )


def test_one_seed_everywhere_and_more_of_them_near_the_optimum():
    """Unequal numbers of points: the plain mean of far rates belongs to seed 0 and would tilt the
    bowl."""
    x = np.concatenate([X, [0.005, 0.08]])
    of = np.concatenate([SEEDS, [0, 0]])
    shift = np.array([0.3, 0.0, -0.3])
    y = 3 + 0.1 * np.log(x / 0.022) ** 2 + shift[of]
    found = fit_blocks(x, y, of, Settings(), "here")
    assert found.estimates["optimum"].value == pytest.approx(0.022, rel=1e-6)
    assert found.estimates["minimum"].value == pytest.approx(3.0, rel=1e-6)
    assert found.predict([0.022])[0] == pytest.approx(3.0, rel=1e-6)
    assert (found.lows[0], found.highs[0], found.points) == (0.005, 0.08, 11)
    assert fit_blocks(x, y, of, Settings(nearest=3), "here").points == 9
    assert (
        fit_blocks(x, y, np.zeros(11), Settings(), "here").law.parameters == 3
    )  # one block: the plain bowl


def test_derivatives():
    generator = np.random.default_rng(1)
    law = ShiftedQuadratic(blocks=3)
    u = np.stack([generator.normal(0, 1, 9), np.arange(9) % 3])
    theta = generator.normal(0, 1, (2, 5))
    _, jacobian = law.predict(theta, u)
    for i in range(5):
        change = 1e-5 * np.eye(5)[i]
        difference = law.predict(theta + change, u)[0] - law.predict(theta - change, u)[0]
        assert jacobian[..., i] == pytest.approx(difference / 2e-5, rel=1e-6, abs=1e-8)


def coverage(draws, replicates=199):
    generator, hits = np.random.default_rng(7), []
    for seed in range(draws):
        found = fit_blocks(
            X,
            draw(generator, noise=0.01),
            SEEDS,
            Settings(replicates=replicates, seed=seed),
            "here",
        ).estimates
        hits.append(
            [
                found[name].low <= true <= found[name].high
                for name, true in (("optimum", 0.022), ("minimum", 3.0))
            ]
        )
    return np.mean(hits, 0)


def test_intervals_cover():
    """Over 400 draws whose shifts are five times the noise."""
    optimum, minimum = coverage(400)
    assert 0.92 <= optimum <= 0.98
    assert 0.92 <= minimum <= 0.99


@pytest.mark.parametrize(
    ("confidence", "blocks", "t"),
    [(0.95, 2, 12.7062), (0.95, 3, 4.30265), (0.95, 10, 2.26216), (0.99, 31, 2.75)],
)
def test_students_t(confidence, blocks, t):
    """Points without errors of their own: what is unknown of the minimum is the mean of the
    shifts."""
    number = np.repeat(np.arange(blocks), 4)
    x = np.tile([0.005, 0.01, 0.02, 0.04], blocks)
    shifts = np.random.default_rng(0).normal(0, 0.05, blocks)
    y = 3 + 0.1 * np.log(x / 0.022) ** 2 + shifts[number]
    settings = Settings(confidence=confidence, replicates=99)
    minimum = fit_blocks(x, y, number, settings, "here").estimates["minimum"]
    error = shifts.std(ddof=1) / np.sqrt(blocks)
    assert (minimum.high - minimum.value) / error == pytest.approx(t, rel=1e-4)
    assert (minimum.value - minimum.low) / error == pytest.approx(t, rel=1e-4)


def test_refusals():
    x, y = X[[0, 1, 2, 3, 6]], draw(np.random.default_rng(0))[[0, 1, 2, 3, 6]]
    with pytest.raises(DataError, match="5 points in 3 different seed are too few .* need 6"):
        fit_blocks(x, y, [0, 0, 0, 1, 2], Settings(), "here", ("lr", "loss"), "seed")
    rows = [
        {"lr": lr, "loss": loss, "seed": s}
        for lr, loss, s in zip(X, draw(np.random.default_rng(0)), SEEDS)
    ]
    table = Table.from_rows(rows, [str(i) for i in range(9)], "made")
    found = fit_table(table, FitRequest("quadratic_log", ["lr"], "loss", block="seed"))
    assert found.as_dict()["block"] == "seed"
    with pytest.raises(ConfigError, match="power has no shifts of blocks .--block"):
        fit_table(table, FitRequest("power", ["lr"], "loss", block="seed"))
    with pytest.raises(ConfigError, match="a joint fit has no shifts"):
        fit_table(
            table,
            FitRequest("quadratic_log", ["lr"], "loss", against="seed", joint=True, block="seed"),
        )
    with pytest.raises(DataError, match="no column"):
        fit_table(table, FitRequest("quadratic_log", ["lr"], "loss", block="sed"))
