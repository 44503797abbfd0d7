"""The report of a sweep: of made-up sweeps whose laws are known."""

import csv
import math
import re

import numpy as np
import pytest
import yaml

from archscale.errors import DataError
from archscale.fit.fit import Estimate
from archscale.plan.counting import training_flops
from archscale.report.sweep_figures import make_figures
from archscale.sweep.analysis import analyse
from archscale.sweep.axes import find_axes
from archscale.sweep.pages import write_sweep_report
from archscale.sweep.record import read_sweep
from tests.commands import launch
from tests.report.made import make_run, metrics
from tests.report.made_sweep import BASE, LR, make_sweep, planted, write_grid
from tests.report.test_command import refused

RATES = [0.005, 0.01, 0.02, 0.04, 0.08]
RULES = [
    {"optimizer.matrix.rule": "muonh", "parameterization.kind": "hyperp"},
    {"optimizer.matrix.rule": "adamw", "parameterization.kind": "standard"},
]
WIDTHS = [32, 64, 128]
BOWL = {"form": "quadratic_log", "x": LR, "y": "val_loss"}
DECAYS = {"optimizer.matrix.rule": "'orscale_lm'", "parameterization.kind": "'standard'"}
FULL = {
    "zip": RULES,
    "axes": {"model.width": WIDTHS, LR: RATES},
    "derive": {"model.aspect": None},
    "seeds": 2,
}


def diverging(made):
    """As planted, and one run of each rule without a finite loss."""
    gone = made.parameterization.base.lr == 0.08 and made.model.width == 128 and made.seed == 1
    return {**planted(made), **({"val_loss": None} if gone else {})}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """60 runs of two rules: one failed, two diverged, one has a report of its own."""
    folder = tmp_path_factory.mktemp("sweep")
    grid = write_grid(
        folder, **FULL, fit=[{**BOWL, "group": "optimizer.matrix.rule", "against": "model.width"}]
    )
    directory = make_sweep(
        folder / "s",
        grid,
        diverging,
        failed={"rule-adamw_width32_lr0.005_seed0": "ran out of <memory>"},
    )
    (directory / "rule-muonh_width32_lr0.01_seed0" / "report.html").write_text("")
    write_sweep_report(directory)
    return directory


def analysed(tmp_path, formula=planted, base=BASE, keys=None, **more):
    return analyse(
        read_sweep(
            make_sweep(
                tmp_path / "s", write_grid(tmp_path, base, **(keys or FULL)), formula, **more
            )
        )
    )


def rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


# --- the page


def test_the_page_says_what_came_of_the_runs(full):
    html = (full / "report.html").read_text()
    assert "59 of 60 runs finished" in html
    assert "rule-adamw_width32_lr0.005_seed0 failed: ran out of &lt;memory&gt;" in html
    assert html.count("val_loss is not finite: left out of all fits") == 2
    statuses = [row["status"] for row in rows(full / "report" / "runs.csv")]
    assert [statuses.count(status) for status in ("finished", "diverged", "failed")] == [57, 2, 1]
    assert 'href="rule-muonh_width32_lr0.01_seed0/report.html"' in html
    assert html.count("/report.html") == 1  # of no run that has none
    for section in (
        "flops",
        "bowls",
        "optima",
        "drift",
        "leverage",
        "stability",
        "fits",
        "grid",
        "runs",
        "environment",
    ):
        assert f'<section id="{section}">' in html, section
    assert 'id="others"' not in html
    assert "2 different: host0, host1" in html
    assert "60 runs" in html
    assert "least squares on val_loss; 95% intervals" in html  # as the command prints
    assert len(html) < 1_000_000


def findings(directory):
    html = write_sweep_report(directory).read_text()
    return re.findall(
        "<li>(.*?)</li>", html.partition('<ul class="findings">')[2].partition("</ul>")[0]
    )


def test_what_could_not_be_fitted_is_not_known(tmp_path):
    """Two sizes: an indicator that is 16 times as large at the second one may grow or not."""

    def formula(made):
        return {**planted(made), "stability/attention_z": 1.0 if made.model.width == 32 else 16.0}

    grid = write_grid(tmp_path, axes={"model.width": [32, 64]}, derive={"model.aspect": None})
    lines = [
        line for line in findings(make_sweep(tmp_path / "s", grid, formula)) if "FLOPs" in line
    ]
    (line,) = [line for line in lines if "grow" in line]
    assert line.startswith("Whether these grow with FLOPs is not known (2 points")
    assert "Attention Z-value" in line
    assert {row["growth"] for row in rows(tmp_path / "s" / "report" / "stability.csv")} == {
        "not known"
    }


def test_growth_is_said_where_an_interval_shows_it(tmp_path):
    def formula(made):
        scale = training_flops(made.model) * made.tokens / 1e8
        noise = {32: 1.0, 64: 1.02, 128: 0.99, 256: 1.01, 512: 0.99}[made.model.width]
        return {
            **planted(made),
            "stability/attention_z": 4.0 * scale**0.3 * noise,
            "stability/mlp_output_rms": 0.3 * scale**-0.2 * noise,
            "optimizer/trust_ratio_mean": noise,
        }

    grid = write_grid(
        tmp_path, axes={"model.width": [32, 64, 128, 256, 512]}, derive={"model.aspect": None}
    )
    lines = findings(make_sweep(tmp_path / "s", grid, formula))
    assert "Attention Z-value grows with FLOPs in 1 of 1 groups." in lines
    assert "Does not grow with FLOPs: MLP output RMS." in lines
    (undecided,) = [line for line in lines if "neither shown nor excluded" in line]
    assert "Trust ratio" in undecided


def test_figures_are_accessible_and_follow_the_page_s_colors(full):
    html = (full / "report.html").read_text()
    labels = re.findall(r'<svg class="figure" role="img" aria-label="([^"]+)"', html)
    assert len(labels) == html.count("<svg") >= 8
    assert all(len(label) > 40 for label in labels)
    assert any("optimum 0.0" in label for label in labels)
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "var(--c0)" in drawn
    assert not re.search(r"#[0-9a-f]{6}", drawn.replace("#000000", "").replace("#b0b0b0", ""))
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', html)) | set(
        re.findall(r"url\(#([^)]+)\)", html)
    ) <= set(ids)
    assert ">0.005<" in drawn  # a tick is not rounded like a coordinate


def test_files_and_tables(full):
    found = {path.name for path in (full / "report").iterdir()}
    figures = {"flops", "bowls", "optimum_width", "drift", "leverage", "stability"}
    assert {f"{name}.{kind}" for name in figures for kind in ("svg", "png")} <= found
    assert found - {f"{name}.{kind}" for name in figures for kind in ("svg", "png")} == {
        f"{name}.csv"
        for name in ("optima", "drift", "curves", "leverage", "stability", "indicators", "runs")
    }
    assert all((full / "report" / name).stat().st_size < 300_000 for name in found)
    for row in rows(full / "report" / "drift.csv"):  # planted: 1/√width
        assert float(row["exponent low"]) < -0.5 < float(row["exponent high"])
        assert abs(float(row["exponent"]) + 0.5) < 0.15
        assert row["expected"] == ("0" if row["group"].startswith("muonh") else "")
        assert row["verdict"] == "below 0"
    for row in rows(
        full / "report" / "leverage.csv"
    ):  # AdamW's loss is 1.06 times as high at exponent −0.05
        assert (row["group"], row["over"]) == ("muonh, hyperp", "adamw, standard")
        assert float(row["leverage"]) == pytest.approx(1.06**20, rel=0.15)
    runs = rows(full / "report" / "runs.csv")
    assert len(runs) == 60
    assert sum(row["status"] in ("finished", "diverged") for row in runs) == 59


def test_the_same_runs_give_the_same_bytes(full, tmp_path):
    before = {
        path.name: path.read_bytes()
        for path in [full / "report.html", *(full / "report").iterdir()]
    }
    write_sweep_report(full)
    assert before == {
        path.name: path.read_bytes()
        for path in [full / "report.html", *(full / "report").iterdir()]
    }
    there = write_sweep_report(full, tmp_path / "other.html")
    assert {path.name for path in (tmp_path / "other").iterdir()} == before.keys() - {"report.html"}
    assert 'href="other/bowls.svg"' in there.read_text()


# --- what a grid varied


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (FULL, (LR, ["optimizer.matrix.rule"], ["model.width"], [])),
        ({"axes": {"training.tokens": [3840, 7680], LR: RATES}}, (LR, [], ["training.tokens"], [])),
        (
            {"axes": {"optimizer.weight_decay": [0.01, 0.02, 0.05, 0.1]}, "derive": DECAYS},
            ("optimizer.weight_decay", [], [], []),
        ),
        (
            {
                "axes": {
                    "optimizer.weight_decay": [0, 0.1],
                    "optimizer.matrix.nesterov": [True, False],
                },
                "derive": DECAYS,
            },
            (None, ["optimizer.matrix.nesterov"], [], ["optimizer.weight_decay"]),
        ),
        (
            {"axes": {"model.moe": [None, {"top_k": 2, "sparsity": 4}], LR: RATES}},
            (LR, ["model.moe"], [], []),
        ),
        ({"seeds": 3}, (None, [], [], [])),
    ],
    ids=["rules", "tokens", "decay", "no rate", "section", "seeds"],
)
def test_any_grid_has_a_report(tmp_path, keys, expected):
    directory = make_sweep(tmp_path / "s", write_grid(tmp_path, **keys))
    sweep = read_sweep(directory)
    axes = find_axes(sweep)
    assert (axes.tuned, axes.arms, axes.scale, axes.others) == expected
    found = analyse(sweep)
    told = [tuple(str(values[key]) for key in axes.cell) for values in sweep.values.values()]
    assert len(found.combinations) == len(set(told))
    names = {figure.name for figure in make_figures(found)}
    assert ("bowls" in names) == (axes.tuned is not None)
    html = write_sweep_report(directory).read_text()
    assert f"{len(sweep.values)} of {len(sweep.values)} runs finished" in html


def test_experts_are_shown_against_their_granularity(tmp_path):
    base = {**BASE, "model": {**BASE["model"], "moe": {"sparsity": 4, "shared_expert": False}}}
    keys = {"axes": {"model.moe.top_k": [1, 2, 4], "model.moe.sqrt_gate": [True, False], LR: RATES}}
    found = analysed(tmp_path, base=base, keys=keys)
    assert found.axes.others == ["model.moe.top_k"]
    figures = {figure.name: figure for figure in make_figures(found)}
    assert "flops" not in figures
    titles = {panel.title: panel for panel in figures["by_top_k"].panels}
    assert {"Validation loss", "MLP output RMS", "Largest load violation"} <= titles.keys()
    [line, _] = titles["Largest load violation"].curves
    assert list(line.y) == pytest.approx([0.2, 0.4, 0.8])
    assert {drift.reference for drift in found.drifts if "true" in drift.arm} == {0.0}
    assert {drift.reference for drift in found.drifts if "false" in drift.arm} == {None}


def test_keys_that_move_together_count_once(tmp_path):
    zipped = [
        {"model.depth": d, "model.width": w, "model.aspect": None}
        for d, w in ((2, 32), (3, 64), (4, 128))
    ]
    found = analysed(tmp_path, keys={"zip": zipped, "axes": {LR: RATES}})
    assert len(found.axes.scale) == 1
    assert len(found.combinations) == 3


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, -0.32), (None, 0.0), (0.1, -0.22)])
def test_what_the_parameterization_expects_along_tokens(tmp_path, exponent, expected):
    keys = {
        "axes": {"training.tokens": [3840, 7680, 15360], LR: RATES},
        "derive": {"parameterization.token_exponent": exponent},
    }
    [drift] = analysed(tmp_path, keys=keys).drifts
    assert drift.reference == pytest.approx(expected)


# --- the bowls


def test_seeds_may_be_more_near_the_optimum(tmp_path):
    keys = {
        "axes": {"model.width": WIDTHS, LR: RATES},
        "seeds": 3,
        "derive": {"model.aspect": None},
        "where": f"seed == 0 or {LR} > 0.008 and {LR} < 0.05",
    }
    found = analysed(tmp_path, keys=keys)
    one = found.combinations[0]
    assert [len(values) for values in one.points] == [1, 3, 3, 3, 1]
    assert [math.isnan(error) for error in one.errors] == [True, False, False, False, True]
    assert one.fit
    assert one.fit.points == 11
    [figure] = [figure for figure in make_figures(found) if figure.name == "bowls"]
    assert len(figure.panels[0].curves[0].x) == 9  # single seeds are their own mean


def test_an_optimum_at_the_edge_says_so(tmp_path):
    found = analysed(
        tmp_path, keys={"axes": {LR: [0.04, 0.08, 0.16, 0.32]}, "seeds": 2}
    )  # the planted one is at 0.028
    [one] = found.combinations
    assert one.edge == "lowest"
    assert one.fit is None
    assert one.notes[0] == "the lowest value tried is the best"
    assert "lies below the grid" in one.notes[1]
    [panel] = next(figure for figure in make_figures(found) if figure.name == "bowls").panels
    assert "the lowest value tried is the best" in panel.finding
    assert any(curve.hollow for curve in panel.curves)


def test_runs_that_came_apart_do_not_flatten_the_bowls(tmp_path):
    found = analysed(
        tmp_path,
        lambda made: (
            planted(made) | ({"val_loss": 90.0} if made.parameterization.base.lr == 0.08 else {})
        ),
    )
    panel = next(figure for figure in make_figures(found) if figure.name == "bowls").panels[0]
    assert panel.y_range
    assert panel.y_range[1] < 20
    assert panel.note == "3 above the frame"


def test_the_grid_s_own_fits_are_taken_where_they_are_of_these_points(tmp_path):
    fits = [
        {
            **BOWL,
            "group": "optimizer.matrix.rule",
            "against": "model.width",
            "where": "optimizer.matrix.rule == 'muonh'",
            "nearest": 4,
            "block": "seed",
        }
    ]
    found = analysed(tmp_path, keys=FULL | {"fit": fits})
    [asked] = [fit.fits for fit in found.fits]
    ours = {one.arm: one.bowl for one in found.combinations if one.row["model.width"] == 64}
    assert ours["muonh, hyperp"] in asked.groups
    assert ours["adamw, standard"] not in asked.groups  # which the grid's fit leaves out
    assert (
        ours["adamw, standard"].fit.points == 8
    )  # with its settings all the same: 4 rates, 2 seeds
    assert {drift.arm: drift.law in asked.laws for drift in found.drifts} == {
        "muonh, hyperp": True,
        "adamw, standard": False,
    }


def bowl_panels(found):
    return [
        p
        for figure in make_figures(found)
        if figure.name.startswith("bowls")
        for p in figure.panels
    ]


def test_a_bowl_is_drawn_as_far_as_its_optimum_may_lie(tmp_path):
    """Dashed beyond the values that it was fitted to, with the remedy where there is one."""

    def lopsided(made):
        """Flat below the optimum and steep above: a parabola fits badly."""
        above = math.log(made.parameterization.base.lr / 0.004)
        noise = 0.004 * math.sin(1e5 * made.parameterization.base.lr)
        return {"val_loss": 3 + noise + 0.02 * max(above, 0) ** 4}

    rates = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    found = analysed(tmp_path, lopsided, keys={"axes": {LR: rates}})
    [one] = found.combinations
    assert one.fit
    assert not one.edge
    assert "the parabola fits poorly" in one.notes
    assert "nearest: 5 in the grid's fit keeps to the values around it" in one.notes
    one.fit.estimates["optimum"] = Estimate(0.002, 0.0004, 0.004)
    [panel] = bowl_panels(found)
    [solid] = [curve for curve in panel.curves if curve.line == "-"]
    [dashed] = [curve for curve in panel.curves if curve.line == "--"]
    assert (solid.x[0], solid.x[-1]) == pytest.approx((0.001, 0.032))
    assert (dashed.x[0], dashed.x[-1]) == pytest.approx((0.0004, 0.001))
    assert "the interval reaches beyond the grid" in panel.finding


def test_a_refused_bowl_shows_where_its_minimum_would_lie(tmp_path):
    found = analysed(tmp_path, keys={"axes": {LR: [0.04, 0.08, 0.16]}, "seeds": 2})
    [one] = found.combinations
    assert one.fit is None
    [panel] = bowl_panels(found)
    [dashed] = [curve for curve in panel.curves if curve.line == "--"]
    assert dashed.x[0] < 0.04  # the planted optimum is at 0.028
    assert np.argmin(dashed.y) == 0
    far = analysed(tmp_path / "far", keys={"axes": {LR: [0.4, 0.8, 1.6]}, "seeds": 2})
    assert not [c for panel in bowl_panels(far) for c in panel.curves if c.line == "--"]


@pytest.mark.parametrize("rules", [1, 2])
def test_curves_of_one_panel_differ_in_color(tmp_path, rules):
    found = analysed(tmp_path, keys=FULL | {"zip": RULES[:rules]})
    for figure in make_figures(found):
        for panel in figure.panels:
            named = [curve for curve in panel.curves if curve.label]
            assert len({curve.ink for curve in named}) == len(named), (figure.name, panel.title)


def test_an_indicator_that_is_the_same_everywhere_is_listed(full):
    html = (full / "report.html").read_text()
    section = html.partition('<section id="constant">')[2].partition("</section>")[0]
    assert "<dt>Share clipped</dt><dd>0</dd>" in section
    assert not re.search(r"<th[^>]*>optimizer/clip_fraction", html)
    assert "optimizer/clip_fraction" in rows(full / "report" / "indicators.csv")[0]


# --- not all there


def test_a_half_finished_sweep(tmp_path):
    grid = write_grid(tmp_path, **FULL, fit=[BOWL])
    names = list(
        yaml.safe_load((make_sweep(tmp_path / "all", grid) / "sweep.yaml").read_text())["runs"]
    )
    directory = make_sweep(tmp_path / "s", grid, unfinished=names[:3], missing=names[20:])
    (directory / names[5] / "metrics.jsonl").write_text("no JSON\n")
    with open(directory / "sweep.jsonl", "a") as log:
        log.write('{"event": "star')
    html = write_sweep_report(directory).read_text()
    assert "16 of 60 runs finished; 44 not finished or not started" in html
    assert "44 runs are missing here" in html
    reasons = {
        row["run"]: (row["status"], row["reason"])
        for row in rows(directory / "report" / "runs.csv")
    }
    assert reasons[names[0]] == ("not finished", "unfinished: step 10 of 20")
    assert reasons[names[30]] == ("not finished", "was not started")
    assert "not a flat JSON object" in reasons[names[5]][1]
    assert reasons[names[10]] == ("finished", "")


def test_a_failure_that_was_made_good_is_none(tmp_path):
    directory = make_sweep(tmp_path / "s", write_grid(tmp_path, axes={LR: RATES}))
    log = directory / "sweep.jsonl"
    log.write_text(
        '{"event": "failed", "run": "lr0.01", "reason": "killed", "again": false}\n'
        + log.read_text()
    )
    assert read_sweep(directory).failed == {}
    with open(log, "a") as stream:
        stream.write('{"event": "failed", "run": "lr0.02", "reason": "killed", "again": true}\n')
    assert read_sweep(directory).failed == {}
    with open(log, "a") as stream:  # it died after its last checkpoint, or was finished elsewhere
        stream.write('{"event": "failed", "run": "lr0.02", "reason": "killed", "again": false}\n')
    assert read_sweep(directory).failed == {}
    assert "lr0.02" in read_sweep(directory).table.rows
    (directory / "lr0.02" / "metrics.jsonl").unlink()
    assert (
        dict(read_sweep(directory).table.left_out)
        == {"lr0.02": "killed"}
        == read_sweep(directory).failed
    )


def test_nothing_finished_yet(tmp_path):
    grid = write_grid(tmp_path, **FULL, fit=[BOWL])
    names = list(
        yaml.safe_load((make_sweep(tmp_path / "all", grid) / "sweep.yaml").read_text())["runs"]
    )
    html = write_sweep_report(make_sweep(tmp_path / "s", grid, missing=names)).read_text()
    assert "0 of 60 runs finished" in html
    assert "no run has finished" in html
    assert "<svg" not in html


def test_damaged_files(tmp_path):
    directory = make_sweep(tmp_path / "s", write_grid(tmp_path, axes={LR: RATES}))
    (directory / "lr0.01" / "environment.json").write_text("{")
    content = yaml.safe_load((directory / "sweep.yaml").read_text())
    (directory / "sweep.yaml").write_text(
        yaml.safe_dump(content | {"fit": [{"form": "cubic", "x": [LR], "y": "loss"}]})
    )
    warnings = read_sweep(directory).warnings
    assert [warning.partition(":")[0] for warning in warnings] == ["sweep.yaml", "lr0.01"]
    for text in ("runs: [", "name: x", "- 1"):
        (directory / "sweep.yaml").write_text(text)
        with pytest.raises(DataError, match=r"sweep\.yaml"):
            read_sweep(directory)


# --- the command line


def test_the_command(tmp_path):
    directory = make_sweep(tmp_path / "s", write_grid(tmp_path, axes={LR: RATES}))
    done = launch(["report", str(directory), "--out", str(tmp_path / "page.html")])
    assert done.stderr == ""
    assert (tmp_path / "page" / "bowls.svg").exists()
    assert not (directory / "report.html").exists()
    run = make_run(tmp_path / "run", metrics(3, layers=1))
    for others in ([directory, run], [run, directory]):
        refused(launch(["report", *map(str, others)], check=False), "a sweep is not compared")
    refused(
        launch(
            ["report", str(directory), "--out", str(tmp_path / "no" / "page.html")], check=False
        ),
        "cannot write.*--out",
    )
