"""Grids and their expressions: which runs a file means, and what is refused before anything
starts."""

import json
import math

import pytest
import yaml

from archscale.errors import ConfigError
from archscale.sweep.expressions import Expression
from archscale.sweep.grid import KEYS, LONGEST_NAME, read_grid
from archscale.sweep.results import check_fits

BASE = {
    "name": "b",
    "model": {"depth": 2, "width": 32, "head_dim": 8, "context": 16, "vocab_size": 100},
    "data": {"train": "d", "val": "d"},
    "training": {"tokens": 3200, "batch_tokens": 160},
}


def grid(folder, overrides=(), /, content=None, **keys):
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE | (content or {})))
    path = folder / "g.yaml"
    path.write_text(yaml.safe_dump({"name": "g", "base": "base.yaml", **keys}, sort_keys=False))
    return read_grid(path, overrides)


def test_a_product_with_points_that_move_together_and_seeds(tmp_path):
    made = grid(
        tmp_path,
        axes={"parameterization.base.lr": ["1e-3", 0.01]},
        zip=[{"model.depth": 2, "model.kv_heads": 1}, {"model.depth": 4, "model.kv_heads": 2}],
        seeds=3,
    )
    runs = made.runs()
    assert len(runs) == 2 * 2 * 3
    assert [run.name for run in runs[:4]] == [
        "depth2_lr0.001_seed0",
        "depth2_lr0.001_seed1",
        "depth2_lr0.001_seed2",
        "depth2_lr0.01_seed0",
    ]
    last = runs[-1]
    assert (last.config.model.depth, last.config.model.kv_heads, last.config.seed) == (4, 2, 2)
    assert (last.config.parameterization.base.lr, last.config.name) == (0.01, last.name)
    assert runs[0].config.parameterization.base.lr == 0.001
    assert len({json.dumps({**run.config.resolved(), "name": ""}) for run in runs}) == len(runs)


def test_several_zips_are_a_product(tmp_path):
    made = grid(
        tmp_path,
        zip=[
            [{"seed": 1}, {"seed": 5}],
            [{"model.depth": 2}, {"model.depth": 4}, {"model.depth": 6}],
        ],
    )
    assert [run.name for run in made.runs()] == [
        f"seed{s}_depth{d}" for s in (1, 5) for d in (2, 4, 6)
    ]


def test_names_take_as_few_keys_of_a_zip_as_tell_its_points_apart(tmp_path):
    points = [
        {"parameterization.kind": kind, "model.depth_mup": mup, "optimizer.matrix.rule": rule}
        for kind, mup, rule in (
            ("standard", True, "muonh"),
            ("standard", False, "muonh"),
            ("standard", True, "adamw"),
        )
    ]
    names = [run.name for run in grid(tmp_path, zip=points).runs()]
    assert names == [
        "depth_mup-true_rule-muonh",
        "depth_mup-false_rule-muonh",
        "depth_mup-true_rule-adamw",
    ]


def test_names_stay_unique_where_they_are_cut_or_cannot_say_all(tmp_path):
    clips = [[0.1, 5.0], [0.1, 6.0]]
    made = grid(
        tmp_path,
        axes={"optimizer.matrix.clip": clips, "data.train": ["a/" * 80, "a." * 80]},
        content={"optimizer": {"matrix": {"rule": "orscale_lm"}}},
    )
    names = [run.name for run in made.runs()]
    assert len(set(names)) == 4
    assert all(len(name) <= LONGEST_NAME + 9 and "/" not in name for name in names)


def test_derived_values_and_conditions_see_what_the_config_will_have(tmp_path):
    """Width follows from aspect × depth, which the base alone does not know."""
    made = grid(
        tmp_path,
        content={"model": {**BASE["model"], "width": None, "aspect": 16}},
        axes={"model.depth": [1, 2, 4]},
        derive={
            "training.tokens": "160 * model.width",
            "eval.batches": "training.tokens // 1600 if model.depth > 1 else 7",
        },
        where="model.width < 64 and training.precision == 'bf16'",
    )
    runs = made.runs()
    assert [
        (r.name, r.config.model.width, r.config.tokens, r.config.eval.batches) for r in runs
    ] == [("depth1", 16, 2560, 7), ("depth2", 32, 5120, 3)]


@pytest.mark.parametrize("turned", [False, True])
def test_derived_values_do_not_depend_on_their_order(tmp_path, turned):
    """A looked-up width follows a derived depth, also one that was itself looked up before."""
    content = {"model": {**BASE["model"], "width": None, "aspect": 16, "depth": 4}}
    derive = {"training.tokens": "160 * model.width", "model.depth": "seed + 1"}
    made = grid(
        tmp_path,
        content=content,
        seeds=[1],
        derive=dict(reversed(derive.items())) if turned else derive,
    )
    assert made.runs()[0].config.tokens == 160 * 32
    derive = {"eval.batches": "model.context", "model.depth": "model.context // 8"}
    made = grid(tmp_path, content=content, seeds=[1], derive=derive, where="model.width == 32")
    assert made.runs()[0].config.model.width == 32


def test_a_condition_can_drop_what_has_no_config(tmp_path):
    keys = {"axes": {"model.width": [32, 33]}, "derive": {"model.aspect": None}}
    with pytest.raises(ConfigError, match=r"(?s)33.*model.width 33 in .*g.yaml"):
        grid(tmp_path, **keys).runs()
    assert len(grid(tmp_path, **keys, where="model.width % 8 == 0").runs()) == 1


def test_overrides_change_the_base_and_not_the_grid(tmp_path):
    assert grid(tmp_path, ["data.train=x"], seeds=1).runs()[0].config.data.train == "x"
    with pytest.raises(ConfigError, match="the grid sets model.depth"):
        grid(tmp_path, ["model.depth=3"], axes={"model.depth": [2]})


def test_more_seeds_around_the_best_of_each_group(tmp_path):
    """Losses with their minimum at the second rate at depth 2, at the end of the axis at depth 4,
    and nowhere at depth 6."""
    made = grid(
        tmp_path,
        axes={"parameterization.base.lr": ["1e-3", 0.002, 0.004, 0.008], "model.depth": [2, 4, 6]},
        seeds=1,
        derive={"model.width": "16 * model.depth"},
        refine={"x": "parameterization.base.lr", "points": 3, "seeds": 3},
    )
    best = {2: 0.002, 4: 0.008, 6: math.nan}
    y = {
        run.name: abs(run.config.parameterization.base.lr - best[run.config.model.depth])
        for run in made.runs()
    }
    found = [
        (r.config.model.depth, r.config.parameterization.base.lr, r.config.seed)
        for r in made.refined(y)
    ]
    expected = [(2, 0.001), (2, 0.002), (2, 0.004), (4, 0.002), (4, 0.004), (4, 0.008)]
    assert sorted(found) == [(depth, lr, seed) for depth, lr in expected for seed in (1, 2)]
    assert {run.name for run in made.refined(y)}.isdisjoint(y)
    assert made.refined({}) == []
    stays = "lr0.004_depth6_seed2"
    assert [run.name for run in made.refined({}, {stays, "lr0.004_depth6_seed0"})] == [stays]
    # A mean over seeds, not the luckiest of them.
    more = grid(
        tmp_path,
        axes={"model.depth": [2, 4, 6]},
        seeds=2,
        refine={"x": "model.depth", "points": 1, "seeds": [7]},
    )
    y = {
        run.name: (
            {2: 1.0, 4: 3.0, 6: 0.5}[run.config.model.depth]
            + 4 * run.config.seed * (run.config.model.depth == 6)
        )
        for run in more.runs()
    }
    assert [(run.config.model.depth, run.config.seed) for run in more.refined(y)] == [(2, 7)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20 * model.width ** 2", 20 * 64**2),
        ("7 // 2 + 7 % 4 - -1", 7),
        ("model.depth < 4 <= 4", True),
        ("1 if model.depth > 2 else 'two'", "two"),
        ("model.width in [32, 64] and not false", True),
        ("model.moe == null or 1 / 0", True),
        ("0 or model.depth", 2),
        ("'a' not in ('b', 'c')", True),
        ("seed * 2", 2e3),
    ],
)
def test_expressions(text, value):
    values = {"model.width": 64, "model.depth": 2, "model.moe": None, "seed": "1e3"}
    assert Expression(text, "here", KEYS)(values.__getitem__) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("__import__('os').system('true')", "is not allowed"),
        ("model.width.__class__", "unknown key"),
        ("(1).__class__", "is not allowed"),
        ("[x for x in [1]]", "is not allowed"),
        ("lambda: 1", "is not allowed"),
        ("max(1, 2)", "is not allowed"),
        ("model['width']", "is not allowed"),
        ("f'{seed}'", "is not allowed"),
        ("1 << 9", "is not allowed"),
        ("seed is 1", "is not allowed"),
        ("b'x'", "is not allowed"),
        ("1j", "is not allowed"),
        ("seed = 1", "is not an expression"),
        ("", "is not an expression"),
        ("(" * 500 + ")" * 500, "is not an expression"),
        ("model.widht > 2", 'unknown key "model.widht".*did you mean model.width'),
        ("1+" * 600 + "1", "1201 characters"),
    ],
)
def test_what_an_expression_may_not_be(text, why):
    with pytest.raises(ConfigError, match=why) as caught:
        Expression(text, "where in g.yaml", KEYS)
    assert "\n" not in str(caught.value)
    assert caught.value.where == "where in g.yaml"


@pytest.mark.parametrize(
    "text",
    [
        "1 / (seed - 1)",
        "9 ** 9 ** 9",
        "'a' * 10 ** 9",
        "-1 ** 0.5 + null",
        "2.0 ** 64 ** 9",
        "seed < 'a'",
        "true + 1",
        "1 in 2",
    ],
)
def test_an_expression_without_a_value(text):
    with pytest.raises(ConfigError, match="has no value"):
        Expression(text, "here", KEYS)({"seed": 1}.__getitem__)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (
            {"axes": {"model.widht": [1]}},
            r"unknown key .*\(axes.model.widht in .*g.yaml\): did you mean model.width",
        ),
        ({"axes": {"lr": [1]}}, "did you mean parameterization.base.lr"),
        ({"zip": [{"model.x": 1}]}, "unknown key"),
        ({"derive": {"modle.width": 1}, "seeds": 1}, "unknown key"),
        ({"axes": {"name": ["a"]}}, "a grid cannot set name"),
        ({}, "the grid has no axes"),
        ({"axes": {"model.depth": []}}, "the axis has no values"),
        ({"axes": {"model.depth": 3}}, "expected a list"),
        ({"zip": [[]], "seeds": 1}, "a list that is not empty"),
        ({"zip": [{"seed": 1}, {"model.depth": 1}]}, "is not in all of its entries"),
        ({"axes": {"model.depth": [2, 2.0]}}, "2.0 is there twice"),
        ({"axes": {"seed": [1, 2]}, "seeds": 2}, "seed is set twice"),
        ({"axes": {"model.moe.top_k": [2], "model.moe": [None]}}, "set the same"),
        ({"seeds": 0}, "got 0, expected a whole number from 1"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"seeds": 2, "were": "1"}, 'unknown key "were".*did you mean where'),
        ({"seeds": 2, "name": "a/b"}, "cannot name a directory"),
        ({"seeds": 2, "base": "no.yaml"}, "there is no file"),
        ({"seeds": 2, "where": "seed > 5"}, "`where` drops all 2 combinations"),
        (
            {"axes": {"seed": list(range(200)), "model.depth": list(range(1, 99))}},
            "19,600 combinations are more",
        ),
        (
            {"seeds": 2, "axes": {"model.kv_heads": [3, 4]}},
            r"kv_heads 3 .*model.kv_heads 3, seed 0",
        ),
        (
            {"seeds": 2, "fit": [{"form": "cubic", "x": "seed", "y": "loss"}]},
            "expected one of power",
        ),
        ({"seeds": 2, "fit": [{"form": "power", "y": "loss"}]}, "fit.0.x is missing"),
        ({"seeds": 2, "derive": {"model.depth": "1 / seed"}}, "has no value with seed 0"),
        (
            {"seeds": 1, "axes": {"model.depth": [2]}, "refine": {"x": "lr", "seeds": 2}},
            '"lr" is no axis .*give one of model.depth',
        ),
        (
            {
                "seeds": 1,
                "axes": {"model.window": [None, 8]},
                "refine": {"x": "model.window", "seeds": 2},
            },
            "window are not all numbers",
        ),
        (
            {
                "seeds": 1,
                "axes": {"model.mlp": ["swiglu"]},
                "refine": {"x": "model.mlp", "seeds": 2},
            },
            "mlp are not all numbers",
        ),
        (
            {"axes": {"model.depth": [2]}, "refine": {"x": "model.depth", "seeds": 2}},
            "more seeds than none .*add `seeds: 1`",
        ),
        (
            {
                "seeds": 3,
                "axes": {"model.depth": [2]},
                "refine": {"x": "model.depth", "seeds": [1]},
            },
            "all of its seeds are in `seeds`",
        ),
        (
            {"seeds": 2, "derive": {"model.depth": "model.width", "model.width": "model.depth"}},
            "need each other",
        ),
    ],
)
def test_refused_grids(tmp_path, keys, why):
    with pytest.raises(ConfigError, match=why) as caught:
        grid(tmp_path, **keys).runs()
    assert "\n" not in str(caught.value)


def test_an_empty_grid_file(tmp_path):
    (tmp_path / "g.yaml").write_text("")
    with pytest.raises(ConfigError, match="the file is empty.*`axes`"):
        read_grid(tmp_path / "g.yaml")


LRS = {"parameterization.base.lr": [0.001, 0.002, 0.004]}
BOWL = {"form": "quadratic_log", "x": "parameterization.base.lr", "y": "val_loss"}


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (
            {"axes": LRS, "fit": [BOWL]},
            r"3 runs at 3 different .* too few for quadratic_log, which needs 4 at 3",
        ),
        (
            {"axes": {"model.depth": [2, 4], **LRS}, "fit": [{**BOWL, "group": "model.depth"}]},
            "3 runs of model.depth 2 at 3",
        ),
        ({"axes": LRS, "seeds": 2, "fit": [BOWL]}, None),
        ({"axes": LRS, "seeds": 2, "fit": [{**BOWL, "x": "lr"}]}, None),
        (
            {"axes": LRS, "seeds": 2, "fit": [{**BOWL, "against": "model.depth"}]},
            "1 different model.depth are too few",
        ),
        (
            {"axes": LRS, "seeds": 2, "fit": [{**BOWL, "y": "val_los"}]},
            "no column .*did you mean val_loss",
        ),
        (
            {"axes": LRS, "seeds": 2, "fit": [{**BOWL, "group": ["model.dpth"]}]},
            "no column .*did you mean model.depth",
        ),
        ({"axes": LRS, "seeds": 2, "fit": [{**BOWL, "y": "optimizer/clip_fraction"}]}, None),
        (
            {"axes": LRS, "seeds": 2, "fit": [{**BOWL, "x": ["seed", "tokens"]}]},
            "quadratic_log takes 1 of x, got 2",
        ),
        (
            {"axes": LRS, "seeds": 2, "fit": [BOWL], "derive": {"data.val": None}},
            "no val_loss without data.val",
        ),
        ({"axes": LRS, "seeds": 2, "fit": [{**BOWL, "where": "model.depth == 2"}]}, None),
        (
            {"axes": LRS, "seeds": 2, "fit": [{**BOWL, "where": "model.depth == 3"}]},
            "`where` drops all runs",
        ),
        (
            {"axes": LRS, "seeds": 2, "fit": [{**BOWL, "where": "model.dept == 2"}]},
            "unknown key .*did you mean model.depth",
        ),
        (
            {
                "axes": LRS,
                "seeds": 2,
                "fit": [{**BOWL, "where": "val_loss < 10 and model.depth == 3"}],
            },
            None,
        ),
        ({"axes": LRS, "seeds": 2, "fit": [{**BOWL, "block": "seed"}]}, None),
        (
            {
                "axes": LRS,
                "seeds": 2,
                "fit": [
                    {
                        **BOWL,
                        "block": "seed",
                        "where": "parameterization.base.lr != 0.001 or seed == 0",
                    }
                ],
            },
            None,
        ),
        (
            {
                "axes": LRS,
                "seeds": 2,
                "fit": [
                    {
                        **BOWL,
                        "block": "seed",
                        "where": "parameterization.base.lr == 0.001 or seed == 0",
                    }
                ],
            },
            "4 runs at 3 different .* needs 5",
        ),
        (
            {"axes": LRS, "seeds": 1, "fit": [{**BOWL, "nearest": 3}]},
            "3 runs at 3 different .* too few",
        ),
        (
            {"axes": {**LRS, "model.depth": [2, 4]}, "seeds": 1, "fit": [{**BOWL, "nearest": 3}]},
            None,
        ),
        (
            {"axes": LRS, "seeds": 2, "fit": [{**BOWL, "form": "power", "nearest": 3}]},
            "power has no best x to be near",
        ),
    ],
)
def test_fits_are_checked_before_any_run(tmp_path, keys, why):
    made = grid(tmp_path, **keys)
    configs = [run.config for run in made.runs()]
    if why is None:
        check_fits(made, configs)
        return
    with pytest.raises(ConfigError, match=why) as caught:
        check_fits(made, configs)
    assert caught.value.where == f"fit.0 in {tmp_path / 'g.yaml'}"


MIXTURES = [
    [{"name": "web", "path": "w", "weight": 1}, {"name": "code", "path": "c", "weight": share}]
    for share in (1, 2, 3, 4)
]


@pytest.mark.parametrize(
    ("y", "why"),
    [
        ("val_loss", None),
        ("val_loss/code", None),
        ("val_loss/wiki", "no val_loss/wiki without a source wiki of data.mixture.* web, code$"),
    ],
)
def test_the_sources_of_a_mixture_are_columns(tmp_path, y, why):
    content = {"data": {"train": None}}
    fit = [{**BOWL, "y": y}]
    lrs = {"parameterization.base.lr": [0.001, 0.002, 0.004, 0.008]}
    made = grid(tmp_path, content=content, axes={**lrs, "data.mixture": MIXTURES}, fit=fit)
    runs = made.runs()
    assert len({run.name for run in runs}) == 16
    if why is None:
        check_fits(made, [run.config for run in runs])
        return
    with pytest.raises(ConfigError, match=why):
        check_fits(made, [run.config for run in runs])


def test_a_source_needs_a_mixture(tmp_path):
    made = grid(tmp_path, axes=LRS, seeds=2, fit=[{**BOWL, "y": "val_loss/web"}])
    with pytest.raises(ConfigError, match="no val_loss/web without .*give data.mixture"):
        check_fits(made, [run.config for run in made.runs()])
