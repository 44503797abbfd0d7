"""`archscale study`: bad files end in one line; small studies run, twice to the same numbers, and
say what the formulas say."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from archscale.errors import ConfigError
from archscale.report.plot import Curve, Panel, draw, svg_text
from archscale.study.config import HybridStudy, LanguageStudy, SpectralStudy, load_study
from archscale.study.flattening import directions, flatness, guaranteed, judged, largest_curvature
from archscale.study.hybrids import matrix_rows
from archscale.study.language import Language
from archscale.study.output import Results, curve, write
from archscale.study.run import run_study
from archscale.study.spectral import planted_conditioning, run_spectral
from archscale.study.spectral_tables import slopes
from tests.commands import launch
from tests.train.tiny import tiny_data

ROOT = Path(__file__).parents[1]
MODEL = {"depth": 1, "width": 16, "head_dim": 8, "context": 16, "tied_embeddings": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def spectral(data: str) -> dict:
    return {
        "study": "spectral_flattening",
        "name": "s",
        "seeds": [0],
        "tolerance": 1e-3,
        "least_squares": {
            "rows": 6,
            "columns": 8,
            "exponents": [0, 1, 2],
            "sigma_means": [0.1, 10],
            "conditions": [1, 10],
            "race": {"sigma_means": [10], "lrs": [0.1], "steps": 3},
        },
        "kronecker": {"rows": 3, "columns": 6, "output_conditions": [1, 10], "samples": 4},
        "language": {
            "model": MODEL,
            "data": data,
            "batch": 2,
            "after": [2],
            "lanczos": 3,
            "samples": 2,
            "race": {"sigma_means": [10], "lrs": [0.1], "steps": 2, "target": 5.0},
        },
    }


def hybrids(data: str, **arm) -> dict:
    return {
        "study": "hybrids",
        "name": "h",
        "seeds": [0],
        "run": {
            "model": MODEL,
            "data": {"train": data},
            "schedule": {"kind": "constant"},
            "training": {
                "tokens": 12 * 64,
                "batch_tokens": 64,
                "micro_batch": 4,
                "precision": "fp32",
                "compile": False,
            },
            "telemetry": {"every": 2},
        },
        "arms": [
            {"label": rule, "rule": rule, "lr": 0.02, "weight_decay": 0.05, **arm}
            for rule in ("orscale_lm", "hybrid_shape", "hybrid_momentum", "hybrid_decoupled")
        ],
    }


def file(tmp_path: Path, content: dict) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        (
            "study=spectral_flatening",
            (
                r"expected one of spectral_flattening, hybrids, sqrt_gate .*did you mean"
                r" spectral_flattening"
            ),
        ),
        ("least_squares.row=3", r'unknown key "row".*did you mean rows'),
        ("language.race.lrs=3", r"expected a list \(language\.race\.lrs"),
        ("language.race.lrs=[]", r"expected a list that is not empty"),
        ("kronecker.input_condition=0.5", r"no condition number is 0\.5 .*at least 1"),
        ("language.model.moe={}", r"experts .*language\.model\.moe"),
        ("language.data=nowhere", r"nowhere"),
        ("language.model.vocab_size=3", r"vocab_size 3 is smaller"),
        ("name=a/b", r"cannot name a directory"),
    ],
)
def test_a_wrong_study_is_refused_by_name(tmp_path, data, override, pattern):
    with pytest.raises(Exception) as error:
        run_study(
            file(tmp_path, spectral(data)),
            [override, "seeds=[0]"],
            tmp_path / "out",
            lambda _: None,
        )
    assert re.search(pattern, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"run": {"seed": 3}}, r"seed is set by the study"),
        ({"run": {"modle": {}}}, r'unknown key "modle".*did you mean model'),
        ({"arms": []}, r"not empty"),
        (
            {"arms": [{"label": "a", "rule": "hybrid_shap", "lr": 1, "weight_decay": 0}]},
            r"did you mean hybrid_shape",
        ),
        (
            {"arms": [{"label": "a", "rule": "muonh", "lr": 1, "weight_decay": 1}]},
            r"does nothing under muonh.*run of arm a: optimizer\.weight_decay",
        ),
        (
            {"arms": [{"label": "a", "rule": "muon", "lr": 1, "weight_decay": 1}] * 2},
            r"two arms are called 'a'",
        ),
        ({"study": None}, r"study is missing"),
    ],
)
def test_a_wrong_ablation_is_refused_before_its_first_run(tmp_path, data, change, pattern):
    content = hybrids(data)
    content |= change | ({"run": content["run"] | change["run"]} if "run" in change else {})
    with pytest.raises(ConfigError, match=pattern) as error:
        load_study(file(tmp_path, content))
    assert "\n" not in str(error.value)


@pytest.mark.timeout(600)
def test_the_command(tmp_path, data):
    """One line for a user's error; otherwise tables, figures and a summary that stands alone."""
    refused = launch(["study", "no.yaml"], check=False, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "there is no file no.yaml" in refused.stderr
    out = tmp_path / "out"
    said = launch(
        ["study", str(file(tmp_path, spectral(data))), "--out", str(out)], cwd=tmp_path, timeout=500
    ).stdout
    assert "Slopes of log" in said
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["least_squares"]["rows"] == 6
    for name, rows in results["tables"].items():
        with open(out / f"{name}.csv") as stream:
            assert len(list(csv.DictReader(stream))) == len(rows) > 0
    page = (out / "summary.html").read_text()
    assert page.count("<svg") == len(list(out.glob("*.svg"))) == 5
    assert "src=" not in page
    assert yaml.safe_load((out / "study.yaml").read_text())["language"]["data"] == data

    # again, in this process: the same numbers
    study = load_study(out / "study.yaml")
    assert isinstance(study, SpectralStudy)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command had; sums depend on their number
    try:
        again = run_spectral(study, lambda _: None)
    finally:
        torch.set_num_threads(threads)
    write(Results("t", {}, again.tables), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["tables"] == results["tables"]

    # Where the theorem is exact, the tables hold it.
    rows = [row for row in results["tables"]["edges_least_squares"] if row["condition"] == 1]
    for row in rows:
        expected = {
            "gradient": 1,
            "normalized": row["sigma_max"],
            "muon_exact": row["sigma_mean"],
        }.get(row["direction"])
        if expected is not None:
            assert row["edge"] == pytest.approx(2 * expected, rel=1e-3)
    found = {(r["family"], r["direction"]): r for r in results["tables"]["slopes"]}
    assert found["least squares, κ = 1", "muon_exact"]["sigma_mean"] == pytest.approx(1, abs=1e-3)
    assert found["least squares, κ = 1", "muon_exact"]["sigma_max"] == pytest.approx(0, abs=1e-3)
    assert found["least squares, κ = 1", "normalized"]["sigma_max"] == pytest.approx(1, abs=1e-3)


def test_the_hybrids_show_their_symptoms(tmp_path, data):
    run_study(file(tmp_path, hybrids(data)), [], tmp_path / "out", lambda _: None)
    tables = json.loads((tmp_path / "out" / "results.json").read_text())["tables"]
    found = {row["arm"]: row for row in tables["symptoms"]}
    assert found["hybrid_shape"]["denominator"] == pytest.approx(1, rel=0.1)  # ‖Q‖ = √min(m, n)
    assert found["hybrid_shape"]["variation"] < 0.1
    assert found["hybrid_momentum"]["at_most"] > 0.9
    first = [row for row in tables["matrices"] if row["arm"] in ("orscale_lm", "hybrid_decoupled")]
    assert first
    assert all(
        row["ratio_first"] == pytest.approx(1, rel=0.3) for row in first
    )  # step 2; calibrated at step 1
    assert (tmp_path / "out" / "symptoms.svg").exists()


def test_matrix_rows_from_a_made_run():
    """A matrix whose norm doubles in 10 steps of relative length 0.1, r = 1 and 6: every column by
    hand."""
    arm = HybridStudy.model_validate(hybrids("d")).arms[3]
    lines = [
        {
            "step": step,
            "optimizer/matrix/a/trust_ratio": ratio,
            "optimizer/matrix/a/weight_norm": norm,
            "optimizer/matrix/a/relative_update": 0.1,
        }
        for step, ratio, norm in ((1, 1.0, 3.0), (11, 6.0, 6.0))
    ]
    [row] = matrix_rows(arm, lines, {"a": (9, 16)})
    assert row["runaway"] == 2
    assert row["denominator"] == pytest.approx((3.0 + 1.0) / 2 / 3)
    assert (row["at_least"], row["at_most"]) == (0, 0.5)
    growth = 0.02 * (0.2 * 4 * 3 / 3) ** 2 / (2 * 0.05)
    K = (2 * math.log(2) / 10 + 2 * 0.02 * 0.05) / (0.1**2 - (0.02 * 0.05) ** 2)
    assert row["growth"] == pytest.approx(growth)
    assert row["correlation"] == pytest.approx(K)
    assert row["ceiling"] == pytest.approx(5 * math.sqrt(K * growth))


def language(data: str, seed: int = 0) -> Language:
    return Language(LanguageStudy.model_validate(spectral(data)["language"]), seed)


def test_curvature_and_edges_of_the_model_against_differences(data):
    of = language(data)
    list(of.train("muon", 0.05, 3, 0.9))
    batch, views = of.held_out(), [of.views[0], of.views[-1]]
    gradients = [G for view, G in zip(of.views, of.gradients(batch)) if view in views]
    product = of.curvature(views, batch)
    v = torch.cat(
        [
            torch.randn(G.shape, generator=torch.Generator().manual_seed(0)).flatten()
            for G in gradients
        ]
    )
    parts = [x.view_as(G) for x, G in zip(v.split([G.numel() for G in gradients]), gradients)]

    def shifted(by: float) -> torch.Tensor:
        for view, part in zip(views, parts):
            view.of(view.parameter.data).add_(part, alpha=by)
        found = [G.flatten() for view, G in zip(of.views, of.gradients(batch)) if view in views]
        for view, part in zip(views, parts):
            view.of(view.parameter.data).sub_(part, alpha=by)
        return torch.cat(found)

    difference = (shifted(1e-3) - shifted(-1e-3)) / 2e-3
    assert (product(v) - difference).norm() < 0.02 * difference.norm()
    rise = of.rise(views, batch, *gradients)
    slope = -sum(float(G.square().sum()) for G in gradients)
    assert rise(1e-2) == pytest.approx(1e-2 * slope, rel=0.05)
    assert rise(0.0) == 0  # the weights are back
    lipschitz = largest_curvature(product, len(v), 20)
    steps = directions("polar_express")
    for name in ("muon_exact", "muon"):
        D = [steps[name](G) for G in gradients]
        assert of.rise(views, batch, *D)(0.5 * guaranteed(gradients, D, lipschitz)) < 0, name


def test_covariances_are_those_of_the_layers(data):
    """A from the embedding's normalized output, B and the gradient against a direct backward
    pass."""
    of = language(data)
    name, A, B, G = next(iter(of.covariances()))
    assert name == "blocks.0.attention.qkv.weight.q"
    inputs = torch.cat([of.held_out(1 + i)[0] for i in range(2)])
    x = (
        torch.nn.functional.rms_norm(of.model.embedding(inputs), (16,), eps=1e-5)
        .flatten(0, 1)
        .double()
    )
    torch.testing.assert_close(A, x.mT @ x / len(x), rtol=1e-4, atol=1e-6)
    assert (torch.linalg.eigvalsh(B) > -1e-9).all()
    assert B.shape == (16, 16)
    torch.testing.assert_close(G[1], of.gradients(of.held_out(2))[0].to(G.dtype))


def test_the_output_covariance_is_that_of_a_tokens_derivatives(data):
    """The last projection, whose output is added to what the head reads: δ is the loss's
    derivative by that sum."""
    of = language(data)
    seen: list[torch.Tensor] = []
    hook = of.model.blocks[-1].register_forward_hook(
        lambda module, given, out: seen.append(out.stream)
    )
    generator, deltas = torch.Generator().manual_seed(0), []
    for i in range(2):
        logits = of.model(of.held_out(1 + i)[0]).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        deltas += [torch.autograd.grad(loss, seen[-1])[0].flatten(0, 1).double()]
    hook.remove()
    delta = torch.cat(deltas)
    *_, (name, _, B, _) = of.covariances()
    assert name == "blocks.0.mlp.down.weight"
    torch.testing.assert_close(B, delta.mT @ delta / len(delta), rtol=1e-4, atol=1e-8)


def test_muon_does_not_know_the_scale_of_the_loss_and_sgd_does(data):
    curves = {
        (rule, scale): list(language(data).train(rule, 0.05, 4, 0.0, scale))
        for rule in ("muon", "sgd")
        for scale in (1.0, 64.0)
    }
    assert curves["muon", 64.0] == pytest.approx(curves["muon", 1.0], rel=1e-4)
    assert curves["sgd", 64.0] != pytest.approx(curves["sgd", 1.0], rel=1e-3)
    scaled = list(language(data).train("sgd", 0.05 * 64, 4, 0.0))
    assert curves["sgd", 64.0] == pytest.approx(scaled, rel=1e-4)


def test_judgement():
    assert judged([2.0, 1.0, 3.0, 0.5], 1.0) == {
        "first_rise": 2,
        "diverged": False,
        "steps_to_target": 1,
        "final": 0.5,
    }
    broken = judged([2.0, 1.5, math.nan], 1.0)
    assert (broken["first_rise"], broken["diverged"], broken["steps_to_target"]) == (2, True, None)


def test_points_without_an_edge_are_counted():
    squares = [
        {
            "condition": 1.0,
            "direction": "muon",
            "edge": edge,
            "lipschitz": 2.0,
            "sigma_mean": edge,
            "sigma_max": 2.0**i,
        }
        for i, edge in enumerate([1.0, 3.0, 5.0, 20.0, math.inf])
    ]
    [row] = slopes({"edges_least_squares": squares, "edges_language": []})
    assert (row["points"], row["without_edge"]) == (4, 1)
    assert row["sigma_mean"] == pytest.approx(1)


def test_planted_conditioning_says_what_the_formulas_say(data):
    study = SpectralStudy.model_validate(spectral(data))
    rows = [row for row in planted_conditioning(study, 0) if row["gradients"] == 4]
    assert [row["condition_before"] for row in rows] == pytest.approx([10, 100])
    assert rows[0]["condition_gain_left"] == rows[0]["condition_before"] / rows[0]["condition_left"]
    assert flatness([torch.eye(3)])["sigma_mean"] == pytest.approx(1)


def test_figures_leave_out_what_cannot_be_drawn_and_tables_write_infinity(tmp_path):
    points = [{"x": 1.0, "y": math.inf}, {"x": 2.0, "y": 3.0}]
    curves = [curve("a", points, "x", "y", marker="o"), curve("none", [], "x", "y", marker="o")]
    panels = [Panel("p", "x", "y", curves, log_y=True)]
    panels += [Panel("zeros", "x", "y", [Curve("a", np.zeros(1), np.zeros(1))], log_y=True)]
    assert svg_text(draw(panels, 2)).count("<svg") == 1
    assert svg_text(draw(panels, 2)) == svg_text(draw(panels, 2))
    write(Results("t", {}, {"rows": [{"a": math.inf, "b": math.nan}, {"c": 1}]}), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["tables"]["rows"] == [
        {"a": "inf", "b": None},
        {"c": 1},
    ]
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["a,b,c", "inf,,", ",,1"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_studies_of_the_configs_load(path):
    assert load_study(path).name == path.stem


def test_sqrt_gate_is_flat_and_the_plain_gate_falls(tmp_path):
    """As the definition says; the study's own figures, with a few small layers."""
    file = tmp_path / "g.yaml"
    settings = {
        "study": "sqrt_gate",
        "name": "g",
        "seeds": [0, 1],
        "width": 64,
        "hidden": 256,
        "tokens": 128,
    }
    file.write_text(yaml.safe_dump({**settings, "granularities": [1, 4, 16], "sparsity": 4}))
    out = run_study(file, [], tmp_path / "out", lambda text: None)
    with open(out / "rms.csv") as table:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(table)]
    assert [row["k"] for row in rows] == [1, 4, 16]
    for row in rows:
        assert row["sqrt_gate"] == pytest.approx(rows[0]["sqrt_gate"], rel=0.05)
        assert row["plain"] == pytest.approx(row["plain_predicted"], rel=0.05)
    assert rows[2]["plain"] < 0.35 * rows[0]["plain"]
    assert (out / "rms.svg").read_text().count("<path") > 3
    with pytest.raises(ConfigError, match=r"3 does not divide 256 hidden features"):
        load_study(file, ["granularities=[1, 3]"])
