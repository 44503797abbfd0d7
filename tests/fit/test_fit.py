"""Fits: parity with closed forms, recovery of known laws, coverage of the stated intervals,
refusals."""

import numpy as np
import pytest

from archscale.errors import DataError
from archscale.fit.fit import Settings, fit
from archscale.fit.laws import LAWS, JointQuadratic
from archscale.fit.leverage import leverage
from archscale.fit.optima import joint_law, optimum_law

TOKENS = np.array([10.4, 20.8, 41.6, 83.2, 166.4]) * 1e9  # HyperP, table 4
BEST_LR = np.array([0.01515, 0.01208, 0.00958, 0.00772, 0.00635])
BEST_LOSS = np.array([2.4741, 2.4189, 2.3773, 2.3456, 2.3214])

N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 3e10, 4)))
GRID = {
    "power": np.geomspace(1e18, 1e21, 12)[None],
    "power_irreducible": np.geomspace(1e18, 1e22, 14)[None],
    "quadratic_log": np.geomspace(0.002, 0.05, 12)[None],
    "chinchilla": np.stack([N, D]),
}
TRUTH = {
    "power": {"coefficient": 30.0, "exponent": -0.05},
    "power_irreducible": {"irreducible": 1.7, "coefficient": 1.1e3, "exponent": -0.16},
    "quadratic_log": {"optimum": 0.012, "minimum": 2.4, "curvature": 0.03},
    "chinchilla": {
        "E": 1.69,
        "A": 406.4,
        "alpha": 0.34,
        "B": 410.7,
        "beta": 0.28,
        "N_exponent": 0.28 / 0.62,
    },
}
LAW = {
    "power": lambda x: 30 * x[0] ** -0.05,
    "power_irreducible": lambda x: 1.7 + 1.1e3 * x[0] ** -0.16,
    "quadratic_log": lambda x: 2.4 + 0.03 * np.log(x[0] / 0.012) ** 2,
    "chinchilla": lambda x: 1.69 + 406.4 * x[0] ** -0.34 + 410.7 * x[1] ** -0.28,
}
NOISE = {"power": 0.01, "power_irreducible": 0.003, "quadratic_log": 0.01, "chinchilla": 0.002}
FORMS = list(LAWS)


def values(fitted) -> dict[str, float]:
    return {name: estimate.value for name, estimate in fitted.estimates.items()}


def draw(form: str, generator, space: str | None = None) -> np.ndarray:
    """A noisy measurement of the law at its grid; errors of ln y, or of y."""
    y = LAW[form](GRID[form])
    error = generator.normal(0, NOISE[form], len(y))
    return y * np.exp(error) if (space or LAWS[form].space) == "log" else y + error


@pytest.mark.parametrize(
    ("space", "exponent", "within"), [("linear", -0.320, 0.001), ("log", -0.3155, 0.00005)]
)
def test_the_published_exponent(space, exponent, within):
    found = fit("power", TOKENS, BEST_LR, Settings(space=space)).estimates["exponent"]
    assert found.value == pytest.approx(exponent, abs=within)
    assert found.low < -0.320 < found.high  # the two spaces do not contradict each other


@pytest.mark.parametrize("form", FORMS)
def test_a_law_without_errors_is_recovered(form):
    found = fit(form, GRID[form], LAW[form](GRID[form]), Settings(replicates=99))
    assert values(found) == pytest.approx(TRUTH[form], rel=1e-6)
    for estimate in found.estimates.values():
        assert estimate.low == estimate.value == estimate.high
    assert found.leave_one_out < 1e-6
    assert found.predict(GRID[form]) == pytest.approx(LAW[form](GRID[form]), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["squares", "huber"])
def test_units_do_not_matter(form, loss):
    """x in other units moves coefficients and optimum only; y in other units multiplies what is in
    units of y."""
    y = draw(form, np.random.default_rng(0))
    settings = Settings(replicates=99, loss=loss)
    before, after = fit(form, GRID[form], y, settings), fit(form, GRID[form] * 1e3, y * 7, settings)
    of_x = {"optimum": 1e3}
    for name in ("irreducible", "minimum", "curvature", "E"):
        of_x[name] = 7.0
    b, a = values(before), values(after)
    of_x["coefficient"] = 7 * 1e3 ** -b.get("exponent", 0)
    of_x["A"], of_x["B"] = 7 * 1e3 ** b.get("alpha", 0), 7 * 1e3 ** b.get("beta", 0)
    tolerance = 2e-3 if loss == "huber" else 1e-5  # δ follows the residuals' median to a thousandth
    assert a == pytest.approx(
        {name: value * of_x.get(name, 1.0) for name, value in b.items()}, rel=tolerance
    )
    for name in ("exponent", "alpha", "beta"):
        if name in b:
            widths = [f.estimates[name].high - f.estimates[name].low for f in (before, after)]
            assert widths[0] == pytest.approx(widths[1], rel=1e-2)


def test_a_power_law_in_log_space_is_the_regression_line_with_students_interval():
    x, y = GRID["power"][0], draw("power", np.random.default_rng(1))
    u, z = np.log(x), np.log(y)
    slope, level = np.polyfit(u, z, 1)
    found = fit("power", x, y, Settings(replicates=20000))
    assert values(found) == pytest.approx(
        {"coefficient": np.exp(level), "exponent": slope}, rel=1e-9
    )
    residuals = z - level - slope * u
    error = np.sqrt((residuals**2).sum() / 10 / ((u - u.mean()) ** 2).sum())
    assert found.estimates["exponent"].low == pytest.approx(
        slope - 2.2281 * error, abs=0.05 * error
    )  # t, 10 d.o.f.
    assert found.estimates["exponent"].high == pytest.approx(
        slope + 2.2281 * error, abs=0.05 * error
    )
    assert found.scale == pytest.approx(np.sqrt((residuals**2).sum() / 10), rel=1e-9)
    leverage = 1 / 12 + (u - u.mean()) ** 2 / ((u - u.mean()) ** 2).sum()
    assert found.leave_one_out == pytest.approx(
        np.sqrt(((residuals / (1 - leverage)) ** 2).mean()), rel=1e-6
    )
    line = np.polyfit(u[:9], z[:9], 1)
    assert found.extrapolation == pytest.approx(
        np.sqrt(((z - np.polyval(line, u))[9:] ** 2).mean()), rel=1e-6
    )


@pytest.mark.parametrize("form", [*FORMS, "joint"])
def test_derivatives(form):
    """Against central differences; a wrong one would only slow the fit down, and spoil the standard
    errors."""
    generator = np.random.default_rng(13)
    law = JointQuadratic(np.zeros(8)) if form == "joint" else LAWS[form]
    u = generator.normal(0, 1, (law.columns, 9))
    if form == "joint":
        u[2] = np.arange(9) % 3
    theta = generator.normal(0, 0.5, (4, law.parameters))
    _, jacobian = law.predict(theta, u)
    for i in range(law.parameters):
        change = 1e-5 * np.eye(law.parameters)[i]
        difference = law.predict(theta + change, u)[0] - law.predict(theta - change, u)[0]
        assert jacobian[..., i] == pytest.approx(difference / 2e-5, rel=1e-6, abs=1e-8)


def test_a_quadratic_is_the_regression_parabola():
    x, y = GRID["quadratic_log"][0], draw("quadratic_log", np.random.default_rng(2))
    a, b, c = np.polyfit(np.log(x), y, 2)
    expected = {"optimum": np.exp(-b / (2 * a)), "minimum": c - b * b / (4 * a), "curvature": a}
    assert values(fit("quadratic_log", x, y)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("form", ["power_irreducible", "chinchilla"])
def test_no_other_parameters_fit_better(form):
    y = draw(form, np.random.default_rng(3))
    found = fit(form, GRID[form], y)
    best = found.sample.theta[:1]
    generator = np.random.default_rng(0)
    near = (
        best
        + generator.normal(0, 1, (500, best.shape[1]))
        * np.sqrt(np.diag(found.sample.covariance[0]))
        * 0.3
    )
    far = found.law.starts(found.centred(GRID[form]), y)
    for theta in (near, far):
        with np.errstate(all="ignore"):
            squares = (
                (np.log(y) - np.log(found.law.predict(theta, found.centred(GRID[form]))[0])) ** 2
            ).sum(1)
        assert not (
            squares < ((np.log(y) - np.log(found.predict(GRID[form]))) ** 2).sum() * (1 - 1e-9)
        ).any()


@pytest.mark.parametrize("form", FORMS)
def test_huber_is_least_squares_until_an_outlier_comes(form):
    y = draw(form, np.random.default_rng(4))
    squares = fit(form, GRID[form], y, Settings(replicates=99))
    same = fit(form, GRID[form], y, Settings(replicates=99, loss="huber", delta=1e6))
    assert values(same) == pytest.approx(values(squares), rel=1e-5)
    spoilt = y.copy()
    spoilt[4] *= 1 + 10 * NOISE[form]
    robust, fooled = (
        fit(form, GRID[form], spoilt, Settings(replicates=99, loss=loss))
        for loss in ("huber", "squares")
    )
    truth = LAW[form](GRID[form])
    off = [np.abs(f.predict(GRID[form]) - truth).max() for f in (robust, fooled)]
    assert off[0] < 0.5 * off[1]


def covered(
    form: str, draws: int, loss: str = "squares", space: str | None = None, replicates: int = 99
) -> dict:
    """Share of draws whose 95 % intervals hold the truth."""
    generator, hits = np.random.default_rng(5), dict.fromkeys(TRUTH[form], 0)
    for seed in range(draws):
        y = draw(form, generator, space)
        found = fit(
            form, GRID[form], y, Settings(space=space, loss=loss, replicates=replicates, seed=seed)
        )
        for name, true in TRUTH[form].items():
            hits[name] += found.estimates[name].low <= true <= found.estimates[name].high
    return {name: hit / draws for name, hit in hits.items()}


SLOWEST = ("chinchilla", "power_irreducible")  # of one kind with the others


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] * (form in SLOWEST)) for form in FORMS]
)
def test_intervals_cover(form):
    shares = covered(form, 400)
    assert all(0.92 <= share <= 0.98 for share in shares.values()), shares


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["squares", "huber"])
@pytest.mark.parametrize("space", ["log", "linear"])
def test_intervals_cover_long(form, loss, space):
    shares = covered(form, 1000, loss, space, 199)
    print(form, loss, space, shares)
    assert all(0.92 <= share <= 0.98 for share in shares.values()), shares


def test_the_optimum_of_a_shallow_bowl_is_covered_too():
    """Noise as large as the curvature: where the optimum's own standard error would claim too
    much."""
    x, generator, hits = GRID["quadratic_log"][0], np.random.default_rng(6), []
    for seed in range(400):
        try:
            found = fit(
                "quadratic_log",
                x,
                LAW["quadratic_log"]([x]) + generator.normal(0, 0.03, 12),
                Settings(replicates=199, seed=seed),
            )
        except DataError:
            continue  # no optimum on the grid
        hits.append(found.estimates["optimum"].low <= 0.012 <= found.estimates["optimum"].high)
    assert len(hits) > 380
    assert 0.92 <= np.mean(hits) <= 0.98


# --- the law of the optima


def bowls(noise: float, generator, scatter: float = 0.0):
    """(points, fits, tokens) of five budgets whose optima follow 20 t^−0.32."""
    tokens, points, fits = np.geomspace(1e9, 1.6e10, 5), [], []
    for number, t in enumerate(tokens):
        optimum = 20 * t**-0.32
        lr = 0.9 * optimum * np.geomspace(0.25, 4, 7)
        best = optimum * np.exp(scatter * generator.normal())
        loss = 2.4 - 0.05 * number + 0.05 * np.log(lr / best) ** 2 + generator.normal(0, noise, 7)
        points.append((lr, loss))
        seed = (int(generator.integers(2**31)), number)
        fits.append(fit("quadratic_log", lr, loss, Settings(replicates=199, seed=seed)))
    return points, fits, tokens


@pytest.mark.parametrize("space", ["log", "linear"])
def test_the_second_stage_is_the_power_law_of_the_optima(space):
    _, fits, tokens = bowls(0.01, np.random.default_rng(7))
    best = [f.estimates["optimum"].value for f in fits]
    found = optimum_law(fits, tokens, Settings(space=space), "w", ("tokens", "lr"))
    assert values(found) == pytest.approx(
        values(fit("power", tokens, best, Settings(space=space))), rel=1e-6
    )


def test_the_second_stage_carries_the_errors_of_the_first():
    """Errors that leave the optima exactly on the law: a fit of the optima alone would claim to be
    certain."""
    grid = np.geomspace(0.25, 4, 7)
    basis = np.vander(np.log(grid), 3)
    error = np.random.default_rng(8).normal(0, 1, 7)
    error -= basis @ np.linalg.lstsq(basis, error, rcond=None)[0]
    tokens, widths = np.geomspace(1e9, 1.6e10, 5), []
    for size in (0.005, 0.01):
        fits = []
        for number, t in enumerate(tokens):
            loss = 2.4 + 0.05 * np.log(grid * 0.9) ** 2 + size * error
            fits.append(
                fit("quadratic_log", grid * 0.9 * 20 * t**-0.32, loss, Settings(seed=(0, number)))
            )
        alone = fit("power", tokens, [f.estimates["optimum"].value for f in fits]).estimates[
            "exponent"
        ]
        found = optimum_law(fits, tokens, Settings(), "w", ("tokens", "lr")).estimates["exponent"]
        assert found.value == pytest.approx(-0.32, abs=1e-9)
        assert alone.high - alone.low < 1e-6
        widths.append(found.high - found.low)
    assert 0.01 < widths[0] < 0.1
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.05)


def coverage_of_laws(draws: int, noise: float, scatter: float = 0.0) -> tuple[float, float]:
    generator, hits = np.random.default_rng(9), np.zeros(2)
    for seed in range(draws):
        points, fits, tokens = bowls(noise, generator, scatter)
        settings = Settings(replicates=199, seed=seed)
        two = optimum_law(fits, tokens, settings, "w", ("tokens", "lr"))
        joint = joint_law(points, fits, tokens, settings, "w")
        for i, law in enumerate((two, joint)):
            hits[i] += law.estimates["exponent"].low <= -0.32 <= law.estimates["exponent"].high
    return tuple(hits / draws)


@pytest.mark.slow
def test_intervals_of_the_law_of_the_optima_cover():
    for noise in (0.002, 0.01, 0.02):
        shares = coverage_of_laws(500, noise)
        print(noise, shares)
        assert all(0.92 <= share <= 0.98 for share in shares), (noise, shares)


def test_the_joint_fit_agrees_with_two_stages_and_is_narrower():
    found = []
    for seed in range(8):
        points, fits, tokens = bowls(0.005, np.random.default_rng(seed))
        two = optimum_law(fits, tokens, Settings(), "w", ("tokens", "lr")).estimates["exponent"]
        joint = joint_law(points, fits, tokens, Settings(), "w").estimates["exponent"]
        assert two.low < joint.value < two.high
        found.append((two.high - two.low, joint.high - joint.low, joint.value))
    two_stages, jointly, exponent = np.mean(found, 0)
    assert jointly < two_stages
    assert exponent == pytest.approx(-0.32, abs=0.01)
    points, fits, tokens = bowls(0.0, np.random.default_rng(10))
    exact = joint_law(points, fits, tokens, Settings(replicates=99), "w")
    assert values(exact) == pytest.approx({"coefficient": 20, "exponent": -0.32}, rel=1e-6)


# --- leverage


def curves(
    generator,
    noise: float = 0.002,
    gain: float = 1.5,
    form: str = "power_irreducible",
    seed: int = 0,
):
    """Curves of A and B: B needs `gain` times the FLOPs everywhere."""
    x, found = np.geomspace(1e18, 6e21, 12), []
    for number, factor in enumerate((gain, 1.0)):
        y = LAW[form]([x * factor]) * np.exp(generator.normal(0, noise, len(x)))
        found.append(fit(form, x, y, Settings(replicates=199, seed=(seed, number))))
    return found


@pytest.mark.parametrize("form", ["power", "power_irreducible"])
def test_leverage_of_a_shifted_curve_is_the_shift(form):
    a, b = curves(np.random.default_rng(0), 0.0, form=form)
    points = leverage(a, b, [], ("a", "b"), "w")
    assert [p.ratio.value for p in points] == pytest.approx([1.5] * 5, rel=1e-6)
    assert (points[0].x, points[-1].x) == pytest.approx((1e18, 6e21))
    assert [p.extrapolated for p in points] == [()] * 4 + [
        ("b",)
    ]  # at the far end B lies beyond its points
    a, b = curves(np.random.default_rng(11))
    for there, back in ((a, b), (b, a)):
        (point,) = leverage(there, back, [1e20], ("a", "b"), "w")
        (inverse,) = leverage(back, there, [point.ratio.value * 1e20], ("b", "a"), "w")
        assert point.ratio.value * inverse.ratio.value == pytest.approx(1, rel=1e-9)
    assert leverage(a, a, [1e20], ("a", "a"), "w")[0].ratio.value == pytest.approx(1, rel=1e-9)


def test_leverage_over_a_curve_that_ends_above():
    x = np.geomspace(1e18, 1e22, 8)
    a, b = (
        fit("power_irreducible", x, E + 1.1e3 * x**-0.16, Settings(replicates=99))
        for E in (1.0, 2.0)
    )
    low, high = leverage(a, b, [1e19, 1e22], ("a", "b"), "w")
    assert np.isfinite(low.ratio.value)
    assert high.ratio.value == np.inf


@pytest.mark.slow
def test_intervals_of_leverage_and_prediction_cover():
    generator, hits = np.random.default_rng(12), np.zeros(2)
    for seed in range(400):
        a, b = curves(generator, seed=seed)
        (point,) = leverage(a, b, [6e21], ("a", "b"), "w")
        (loss,) = b.predict_interval([1e23])
        hits += [
            point.ratio.low <= 1.5 <= point.ratio.high,
            loss.low <= LAW["power_irreducible"]([1e23]) <= loss.high,
        ]
    assert (hits / 400 >= 0.92).all(), hits / 400
    assert (hits / 400 <= 0.98).all(), hits / 400


def test_leverage_refusals():
    x = np.geomspace(1e18, 1e20, 6)
    falling, rising = (fit("power", x, 30 * x**k) for k in (-0.05, 0.05))
    later = fit("power", x * 1e6, 30 * (x * 1e6) ** -0.05)
    with pytest.raises(DataError, match="the curve of b does not fall"):
        leverage(falling, rising, [], ("a", "b"), "w")
    with pytest.raises(DataError, match="have no x in common.*--at"):
        leverage(falling, later, [], ("a", "b"), "w")
    with pytest.raises(DataError, match="quadratic_log is no curve"):
        leverage(
            falling,
            fit(
                "quadratic_log", GRID["quadratic_log"], LAW["quadratic_log"](GRID["quadratic_log"])
            ),
            [],
            ("a", "b"),
            "w",
        )


# --- refusals


@pytest.mark.parametrize(
    ("form", "x", "y", "settings", "message"),
    [
        (
            "power",
            [1, 2],
            [1, 2],
            {},
            r"^2 points are too few for power, which needs 3 at 2 different ones",
        ),
        ("power_irreducible", [1, 2, 3], [3, 2, 1.5], {}, r"which needs 4"),
        ("quadratic_log", [1, 2, 3, 4, 5], [3, 2, 1, 2, 3.1], {"loss": "huber"}, r"which needs 6"),
        (
            "chinchilla",
            [N[:5], D[:5]],
            N[:5],
            {},
            r"^5 points are too few for chinchilla, which needs 6",
        ),
        ("power", [2, 2, 2, 2], [1, 2, 3, 4], {}, r"^4 points at 1 different x are too few"),
        (
            "power",
            [1, 2, 3],
            [1, 0, 3],
            {},
            r"^power takes the logarithm of y, and 1 of its values are not above 0, such as 0 ",
        ),
        ("quadratic_log", [-1, 2, 3, 4], [3, 2, 1, 2], {}, r"the logarithm of x.*-1"),
        ("quadratic_log", [1, 2, 4, 8], [0, -1, -1, 0], {"space": "log"}, r"the logarithm of y"),
        (
            "chinchilla",
            [N, 20 * N * (1 + 1e-3 * np.sin(D))],
            N,
            {},
            r"^x and y move together|^N and D move together",
        ),
        (
            "chinchilla",
            [N, np.where(D > 5e9, 1e9, 2e9)],
            N,
            {},
            r"needs 3 different values of D, there are 2",
        ),
        (
            "quadratic_log",
            [1, 2, 4, 8],
            [1, 2, 2, 1],
            {},
            r"^the bowl of y opens downwards.*\(here\): add runs on both sides",
        ),
        (
            "quadratic_log",
            [1, 2, 4, 8],
            [9, 6, 3.5, 1.5],
            {},
            (
                r"^the optimal x .* lies above the grid, which spans 1 to 8 \(here\): add runs with"
                r" a higher x"
            ),
        ),
        ("quadratic_log", [1, 2, 4, 8], [1.5, 3.5, 6, 9], {}, r"lies below the grid.*lower x"),
        (
            "power_irreducible",
            [1, 2, 4, 8, 16, 32],
            [6, 5, 4, 3, 2, 1],
            {},
            r"does not settle.*fewer parameters",
        ),
    ],
)
def test_refusals(form, x, y, settings, message):
    names = ("N", "D", "y") if form == "chinchilla" else ("x", "y")
    with pytest.raises(DataError, match=message):
        fit(form, x, y, Settings(**settings), where="here", names=names)
