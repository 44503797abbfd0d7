"""`archscale fit` on CSV files and run directories: columns, groups, what is left out, output,
errors in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from archscale import cli
from archscale.config import Config, dump_config
from archscale.errors import ConfigError, DataError
from archscale.fit.fit import Settings, fit
from archscale.fit.groups import FitRequest, fit_table
from archscale.fit.laws import LAWS
from archscale.fit.table import Table
from archscale.fit.text import render
from archscale.plan import counting
from archscale.sweep.table import read_table

FAST = Settings(replicates=99)
RATES = np.geomspace(0.002, 0.05, 7)
TOKENS = (1e9, 2e9, 4e9, 8e9)


def bowl_rows(widths=(64, 128), noise=0.003):
    generator = np.random.default_rng(0)
    for width in widths:
        for tokens in TOKENS:
            for lr in RATES:
                loss = (
                    2.4
                    + 0.05 * np.log(lr / (0.01 * (tokens / 2e9) ** -0.32)) ** 2
                    + generator.normal(0, noise)
                )
                yield {"width": width, "tokens": tokens, "lr": lr, "val_loss": loss}


def write_csv(path: Path, rows, header=None) -> Path:
    rows = list(rows)
    lines = [",".join(header or rows[0])] + [
        ",".join(str(value) for value in row.values()) for row in rows
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def bowls(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("csv") / "bowls.csv", bowl_rows())


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "archscale", "fit", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )


def refused(result, pattern: str) -> None:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert re.search(f"^archscale: .*{pattern}", line), line


# --- tables


@pytest.mark.parametrize(
    ("header", "name", "found"),
    [
        (["tokens", "val_loss"], "val_loss", "val_loss"),
        (["Tokens", "Val_Loss"], "val_loss", "Val_Loss"),
        (["x", "summary/val_loss"], "val_loss", "summary/val_loss"),
        (["x", "run one - val_loss", "run one - val_loss__MIN"], "val_loss", "run one - val_loss"),
        (["val_loss", "best/val_loss"], "val_loss", "val_loss"),  # a whole name comes first
        (["config.model.width", "y"], "model.width", "config.model.width"),
    ],
)
def test_columns_are_found_behind_prefixes(header, name, found):
    assert Table("t", {column: [] for column in header}, []).find(name) == found


def test_columns_that_are_not_there_or_not_clear():
    table = Table("t.csv", {"a/loss": [], "b/loss": [], "tokens": []}, [])
    with pytest.raises(
        DataError, match=r'^"loss" could be "a/loss" or "b/loss" \(t.csv\): give the whole name'
    ):
        table.find("loss")
    with pytest.raises(
        DataError,
        match=r'no column "token" .*did you mean tokens\? The columns are a/loss, b/loss, tokens',
    ):
        table.find("token")


def test_a_csv_as_spreadsheets_and_trackers_write_it(tmp_path):
    path = tmp_path / "export.csv"
    path.write_bytes(
        '﻿"Name","State","config/lr","val loss, last"\r\n"a,'
        ' b","finished","1e-3","2.5"\r\n\r\nc,crashed,,NaN\r\n'.encode()
    )
    table = read_table([path])
    assert list(table.columns) == ["file", "Name", "State", "config/lr", "val loss, last"]
    assert table.columns["Name"] == ["a, b", "c"]
    assert table.columns["config/lr"] == [1e-3, None]
    assert np.isnan(table.columns["val loss, last"][1])
    assert table.rows == [f"line 2 of {path}", f"line 4 of {path}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no column names"),
        ("a,a\n1,2\n", 'the column "a" is there twice'),
        ("a,b\n1,2\n1,2,3\n", r"3 values for 2 columns \(line 3"),
        (b"a,b\n\xff\xfe,1\n", "cannot be read as CSV"),
        ('a,b\n"1,2\n', "cannot be read as CSV"),
    ],
)
def test_csv_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_table([path])


def make_run(
    folder: Path, name: str, width: int, lr: float, losses, steps: int = 4, total: int = 4
) -> Path:
    """A run directory as `train` leaves it."""
    config = Config.from_dict(
        {
            "name": name,
            "model": {"depth": 2, "width": width, "head_dim": 16, "context": 16, "vocab_size": 300},
            "parameterization": {"base": {"lr": lr}},
            "data": {"train": "d"},
            "training": {"tokens": 64 * total, "batch_tokens": 64, "micro_batch": 4},
        }
    )
    run = folder / name
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    dump_config(config, run / "config.yaml")
    lines = [
        {"step": s + 1, "tokens": 64 * (s + 1), "time": 1.5, "loss": 3.0} for s in range(steps)
    ]
    for line, loss in zip(lines[-len(losses) :], losses):
        line["val_loss"] = loss
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_directory_of_runs(tmp_path):
    for width in (64, 128):
        for number, lr in enumerate(RATES):
            make_run(
                tmp_path / f"w{width}",
                f"r{number}",
                width,
                lr,
                [9.0, 2 + 0.1 * np.log(lr / 0.01) ** 2],
            )
    make_run(tmp_path, "diverged", 64, 0.9, [None])
    make_run(tmp_path, "unfinished", 64, 0.02, [5.0], steps=3)
    (tmp_path / "waiting").mkdir()
    (tmp_path / "waiting" / "config.yaml").write_text(
        (tmp_path / "diverged" / "config.yaml").read_text()
    )
    (tmp_path / "grid.yaml").write_text("name: not a run")
    with (tmp_path / "w64" / "r0" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "val_l')  # cut short by a crash
    table = read_table([tmp_path])
    assert len(table.rows) == 15
    row = {
        name: cells[table.rows.index(str(tmp_path / "w128" / "r3"))]
        for name, cells in table.columns.items()
    }
    model = Config.from_dict(
        yaml.safe_load((tmp_path / "w128" / "r3" / "config.yaml").read_text())
    ).model
    assert (row["model.width"], row["tokens"], row["loss"], row["run"]) == (
        128,
        256,
        3.0,
        str(tmp_path / "w128" / "r3"),
    )
    assert row["parameterization.base.lr"] == pytest.approx(0.01)
    assert row["parameters"] == counting.parameters(model).total
    assert row["flops"] == counting.training_flops(model) * 256
    assert row["published_flops"] == counting.published_flops_per_token(model) * 256
    fits = fit_table(
        table,
        FitRequest(
            "quadratic_log", ["base.lr"], "val_loss", ["model.width", "model.depth"], settings=FAST
        ),
    )
    assert [group.label for group in fits.groups] == [
        "model.width 64, model.depth 2",
        "model.width 128, model.depth 2",
    ]
    for group in fits.groups:
        assert group.fit.points == 7
        assert group.fit.estimates["optimum"].value == pytest.approx(0.01)
    assert {Path(name).name: reason for name, reason in fits.excluded} == {
        "diverged": "val_loss is not finite",
        "unfinished": "unfinished: step 3 of 4",
        "waiting": "has no metrics.jsonl",
    }
    assert read_table([tmp_path / "w64" / "r3"]).rows == [str(tmp_path / "w64" / "r3")]


def test_a_directory_without_runs(tmp_path):
    with pytest.raises(DataError, match="no run directory in it.*config.yaml and metrics.jsonl"):
        read_table([tmp_path])
    broken = make_run(tmp_path, "r", 64, 0.01, [2.0])
    (broken / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"not a flat JSON object \(line 2 of"):
        read_table([tmp_path])


# --- groups


def table_of(rows) -> Table:
    rows = list(rows)
    return Table.from_rows(rows, [f"row {number}" for number in range(len(rows))], "rows")


def test_a_group_is_fitted_as_if_it_were_alone():
    rows = list(bowl_rows())
    mixed = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    fits = fit_table(
        table_of(mixed),
        FitRequest("quadratic_log", ["lr"], "val_loss", ["width", "tokens"], settings=FAST),
    )
    assert [group.key for group in fits.groups] == [(w, t) for w in (64, 128) for t in TOKENS]
    for group in fits.groups:
        own = [row for row in rows if (row["width"], row["tokens"]) == group.key]
        alone = fit(
            "quadratic_log", [row["lr"] for row in own], [row["val_loss"] for row in own], FAST
        )
        for name, estimate in alone.estimates.items():
            assert group.fit.estimates[name].value == pytest.approx(estimate.value, rel=1e-9)


@pytest.mark.parametrize("joint", [False, True])
def test_optimal_lr_against_tokens(joint):
    fits = fit_table(
        table_of(bowl_rows()),
        FitRequest("quadratic_log", ["lr"], "val_loss", ["width"], against="tokens", joint=joint),
    )
    assert [law.label for law in fits.laws] == ["width 64", "width 128"]
    for law in fits.laws:
        exponent = law.fit.estimates["exponent"]
        assert exponent.value == pytest.approx(-0.32, abs=0.02)
        assert exponent.high - exponent.low < 0.1
    found = fits.as_dict()["optimum"]
    assert (
        found["groups"][0]["parameters"]["exponent"]["value"]
        == fits.laws[0].fit.estimates["exponent"].value
    )
    assert "optimal lr = coefficient · x^exponent, x = tokens" in render(fits)


def test_groups_have_errors_of_their_own():
    """The same seed for all would make the errors of the optima move together."""
    fits = fit_table(
        table_of(bowl_rows((64,))),
        FitRequest("quadratic_log", ["lr"], "val_loss", ["tokens"], settings=FAST),
    )
    errors = [
        group.fit.sample.theta[1:, 0] - group.fit.sample.theta[0, 0] for group in fits.groups[:2]
    ]
    assert abs(np.corrcoef(errors)[0, 1]) < 0.4


def test_a_refused_group_does_not_hide_the_others():
    rows = list(bowl_rows((64,)))
    for row in rows:
        if row["tokens"] == 2e9:
            row["val_loss"] = 5 - row["val_loss"]
        if row["tokens"] == 4e9:
            row["val_loss"] = float("nan") if row["lr"] > 0.005 else row["val_loss"]
    fits = fit_table(
        table_of(rows),
        FitRequest("quadratic_log", ["lr"], "val_loss", against="tokens", settings=FAST),
    )
    assert [group.fit is None for group in fits.groups] == [False, True, True, False]
    assert len(fits.excluded) == 5
    refusal = str(fits.refusal)
    assert "\n" not in refusal
    assert re.search(
        r"bowl of val_loss opens downwards.*\(tokens 2000000000 in rows\).*also refused: tokens"
        r" 4000000000; the law",
        refusal,
    )
    assert "refused: the bowl" in render(fits)
    json.dumps(fits.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"form": "chinchilla"}, ConfigError, "chinchilla takes 2 of --x, got 1"),
        ({"form": "power", "x": ["lr", "tokens"]}, ConfigError, "power takes 1 of --x, got 2"),
        ({"form": "power", "against": "tokens"}, ConfigError, "power has no optimum to follow"),
        ({"joint": True}, ConfigError, "add --against COLUMN"),
        ({"at": [1.0]}, ConfigError, "add --leverage A B"),
        ({"settings": Settings(delta=1.0)}, ConfigError, "squares have no delta"),
        ({"over": ("64", "128"), "against": "tokens"}, ConfigError, "no curves"),
        (
            {"form": "power", "over": ("64", "32"), "group": ["width"]},
            DataError,
            "no group 32 .*the groups are 64, 128",
        ),
        ({"form": "power", "over": ("a", "b")}, DataError, "the groups are none: give --group"),
        ({"y": "loss"}, DataError, r'^"loss"|there is no column'),
        ({"x": ["name"]}, DataError, r'"a" is not a number \(name in row 0\)'),
    ],
)
def test_arguments_that_do_not_go_together(arguments, error, message):
    rows = [row | {"name": "a", "train_loss": 1.0, "loss_": 2.0} for row in bowl_rows()]
    given = {"form": "quadratic_log", "x": ["lr"], "y": "val_loss", "settings": FAST} | arguments
    if given["y"] == "loss":
        message = '"loss" could be "val_loss" or "train_loss"'
    with pytest.raises(error, match=message):
        fit_table(table_of(rows), FitRequest(**given))


def test_nothing_left_to_fit():
    rows = [row | {"val_loss": float("nan")} for row in bowl_rows((64,))]
    with pytest.raises(
        DataError, match=r"no rows to fit.*row 0: val_loss is not finite \(and 27 more\)"
    ):
        fit_table(table_of(rows), FitRequest("quadratic_log", ["lr"], "val_loss"))


# --- commands


def test_choices_of_the_command_are_those_of_the_forms():
    assert [form.value for form in cli.Form] == list(LAWS)


def test_text_and_json_say_the_same(bowls):
    common = [
        bowls,
        "--x",
        "lr",
        "--y",
        "val_loss",
        "--group",
        "width",
        "--form",
        "quadratic_log",
        "--against",
        "tokens",
    ]
    text, data = run(*common), run(*common, "--json")
    assert (text.returncode, data.returncode) == (0, 0), text.stderr + data.stderr
    found = json.loads(data.stdout)
    assert [law["group"] for law in found["optimum"]["groups"]] == [
        {"width": 64.0},
        {"width": 128.0},
    ]
    for group in [*found["groups"], *found["optimum"]["groups"]]:
        name = "optimum" if "optimum" in group["parameters"] else "exponent"
        estimate = group["parameters"][name]
        assert (
            f"{estimate['value']:.5g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"
            in text.stdout
        )
        assert group["leave_one_out"] > 0


def test_leverage_of_two_files(tmp_path):
    """Two exports, told apart by their names."""
    paths = []
    for name, gain in (("hyperp", 1.58), ("muon", 1.0)):
        rows = [
            {"flops": c, "loss": 1.6 + 900 * (gain * c) ** -0.155}
            for c in np.geomspace(1e18, 6e21, 8)
        ]
        paths.append(write_csv(tmp_path / f"{name}.csv", rows))
    result = run(
        *paths,
        "--x",
        "flops",
        "--y",
        "loss",
        "--group",
        "file",
        "--form",
        "power_irreducible",
        "--leverage",
        *paths,
        "--at",
        "6e21",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["leverage"]
    assert found["of"] == str(paths[0])
    (point,) = found["points"]
    assert point["value"] == pytest.approx(1.58, rel=1e-4)
    assert point["extrapolated"] == [str(paths[1])]


def test_bad_input_ends_in_one_line(tmp_path, bowls):
    common = ["--y", "val_loss", "--form", "quadratic_log"]
    refused(
        run(bowls, "--x", "rate", *common),
        r'no column "rate" \(.*bowls.csv\): .*width, tokens, lr, val_loss',
    )
    refused(
        run(tmp_path / "no.csv", "--x", "lr", *common), r"no such file or directory \(.*no.csv\)"
    )
    refused(
        run(bowls, "--x", "lr", "--y", "val_loss", "--form", "cubic"),
        r"'cubic' is not one of 'power'",
    )
    rising = [row for row in bowl_rows() if row["lr"] > 0.02 and row["tokens"] == 1e9] + list(
        bowl_rows()
    )
    part = write_csv(
        tmp_path / "part.csv", [row for row in rising if row["tokens"] > 1e9 or row["lr"] > 0.015]
    )
    result = run(part, "--x", "lr", *common, "--group", "tokens", "--replicates", "99")
    refused(
        result,
        r"the optimal lr .* lies below the grid.*\(tokens 1000000000 in .*part.csv\): add runs with"
        r" a lower lr",
    )
    assert "refused: the optimal lr" in result.stdout
    assert "tokens 8000000000" in result.stdout


def test_a_bowl_from_the_points_around_its_bottom():
    """Far up its sides the bowl is no parabola: all points miss the optimum, the nearest three find
    it."""
    x = np.array([0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064])
    u = np.log(x / 0.0157)
    y = 2 + 0.1 * (np.exp(u) - u - 1)  # steep above, flat below
    rows = [
        {"lr": lr, "loss": loss + 1e-4 * s, "seed": s} for lr, loss in zip(x, y) for s in range(2)
    ]
    table = Table.from_rows(rows, [str(i) for i in range(len(rows))], "made")
    [all_], [near] = (
        fit_table(
            table, FitRequest("quadratic_log", ["lr"], "loss", settings=Settings(nearest=nearest))
        ).groups
        for nearest in (None, 3)
    )
    assert (all_.fit.points, near.fit.points) == (14, 6)
    assert abs(all_.fit.estimates["optimum"].value / 0.0157 - 1) > 0.2
    assert near.fit.estimates["optimum"].value == pytest.approx(0.0157, rel=0.1)
    assert sorted(set(near.x[0])) == [0.008, 0.016, 0.032]
    with pytest.raises(ConfigError, match="3 different x.*--nearest"):
        fit_table(table, FitRequest("quadratic_log", ["lr"], "loss", settings=Settings(nearest=2)))
