"""A report shows every key of metrics.jsonl, stays small, needs no network, and works on a run at
any moment."""

import base64
import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from archscale.errors import ArchscaleError, DataError
from archscale.report.figures import make_figures
from archscale.report.indicators import REGISTRY, SECTIONS, family, parse_key
from archscale.report.maps import LEVELS, HeatMap, palette
from archscale.report.plot import VARIABLES
from archscale.report.read import RunRecord, Series, read_run, read_runs
from archscale.report.run import render
from archscale.report.scale import Scale
from archscale.sweep.pages import write_report
from tests.commands import ROOT
from tests.report.made import PLAN, make_run, metrics

VOID = {"meta", "link", "input", "br", "image", "path"}
AXES = {"step", "tokens", "time", "event"}


class Page(HTMLParser):
    """Fails on tags that do not nest; keeps figures, constants, addresses, ids and what the script
    draws."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[dict[str, str]] = []
        self.constants: list[dict[str, str]] = []
        self.data: dict = {}
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = {key: value or "" for key, value in attrs}
        assert len(found) == len(attrs), f"an attribute twice in <{tag}>"
        self.addresses += [
            value
            for key, value in found.items()
            if key in ("href", "src", "xlink:href", "action", "srcset")
        ]
        self.ids += [found["id"]] if "id" in found else []
        if "data-key" in found:
            (self.figures if tag == "figure" else self.constants).append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
        elif data.startswith('{"charts"'):
            self.data = json.loads(data)

    @property
    def curves(self) -> list[dict]:
        return [curve for chart in self.data["charts"] for curve in chart["curves"]]

    @property
    def keys(self) -> set[str]:
        """Metrics keys that figures show or that are listed with their value."""
        keys = set()
        for figure in self.figures + self.constants:
            for key in figure["data-key"].split():
                keys |= (
                    {key.replace("*", row) for row in figure.get("data-rows", "").split()}
                    if "*" in key
                    else {key}
                )
        return keys


def report(tmp_path: Path, lines, plan=PLAN, tail: str = "", name: str = "run") -> tuple[Page, str]:
    html = write_report([make_run(tmp_path / name, lines, plan, tail)]).read_text()
    return Page(html), html


def curve(page: Page, name: str, number: int = 0) -> list[tuple[int, float]]:
    """(step, value) of a curve, as the script gets it."""
    found = [curve for curve in page.curves if curve["name"] == name][number]
    return [(x, y) for x, y in zip(found["x"], found["y"]) if y is not None]


def test_every_key_is_in_a_figure(tmp_path):
    lines = metrics(60, layers=3, every=10, experts=4)
    lines[30] |= {
        "surprise": 3.0,
        "group/unheard_of": 1.5,
        "group/some_layer/unheard_of": 2.5,
        "lists/of_numbers": [1, 2],
    }
    lines[40] |= {
        "surprise": True,
        "spectrum/gradient/nuclear_norm": 4.0,
        "note": "a text",
        "odd/tree": {"a": 1},
    }
    page, _ = report(tmp_path, lines)
    keys = set().union(*lines) - AXES - {"note", "odd/tree"}
    assert keys - page.keys == set()
    assert "a text" in page.text
    assert "odd/tree" in page.text
    assert not page.keys - keys - {key for key in page.keys if key.endswith("/flattening_gain")}


def test_it_says_nothing_about_what_is_not_there(tmp_path):
    lines = [
        {"step": s, "tokens": 10 * s, "time": 1.0 * s, "loss": 3.0 - s / 100} for s in range(1, 50)
    ]
    page, _ = report(tmp_path, lines, plan=None)
    assert page.keys == {"loss"}
    for word in ("Spectra", "Experts", "Stability", "Optimizer", "Events", "Validation", "FLOPs"):
        assert word not in page.text


def test_it_is_well_formed_and_needs_no_network(tmp_path):
    lines = metrics(60, layers=3, experts=4)
    lines[5]["event"] = "</script><b>&amp; \"'"
    page, html = report(tmp_path, lines, PLAN | {"name": "<name> & 'more'"})
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]", html.replace("http://www.w3.org/", ""))
    assert "@import" not in html
    assert "url(" not in html
    assert "</script><b>" not in html
    assert "<name>" not in html
    assert len(page.figures) == html.count("<figcaption>")


def test_curves_are_what_was_measured(tmp_path):
    lines = metrics(2000, layers=1, every=100)
    lines[1234]["grad_norm"] = 77.0
    page, _ = report(tmp_path, lines)
    loss = curve(page, "training")
    assert loss[0][0] == 1
    assert loss[-1][0] == 2000
    by_step = {line["step"]: line["loss"] for line in lines}
    assert all(abs(by_step[int(step)] - value) < 1e-3 for step, value in loss)
    assert max(curve(page, "grad_norm"), key=lambda point: point[1]) == (
        1235,
        pytest.approx(77, rel=1e-3),
    )


def test_a_value_that_is_missing_breaks_the_curve_and_is_an_event(tmp_path):
    lines = metrics(50, layers=1)
    lines[20] |= {"loss": None, "event": "non-finite loss"}
    lines[30] |= {"grad_norm": None}
    page, _ = report(tmp_path, lines)
    broken = next(curve for curve in page.curves if curve["name"] == "training")
    assert broken["y"].count(None) == 1
    at = broken["y"].index(None)
    assert broken["x"][at - 1] < 21 < broken["x"][at + 1]
    assert 21 not in [step for step, _ in curve(page, "training")]
    assert "2 events" in page.text
    assert "first at step 21: non-finite loss" in page.text
    assert "non-finite grad_norm" in page.text
    assert page.data["runs"][0]["eventSteps"] == [21, 31]


def big_run(layers: int = 24, experts: int = 0, steps: int = 10_000) -> RunRecord:
    """10,000 steps with all that 24 layers can write, in noise, which compresses worst."""
    rng = np.random.default_rng(0)
    every, reading = np.arange(1, steps + 1), np.arange(10, steps + 1, 10)
    run = RunRecord(
        Path("big"), "big", every, every * 2048.0, every * 1.0, plan=copy.deepcopy(PLAN)
    )
    sample = metrics(10, layers=layers, experts=experts)[-1]
    for key, value in sample.items():
        at = (
            every
            if key in ("loss", "grad_norm", "lr", "tokens_per_second", "step_seconds")
            else reading
        )
        shape = (len(at), len(value)) if isinstance(value, list) else len(at)
        if key not in AXES:
            run.series[key] = Series(at, np.exp(rng.standard_normal(shape)))
    run.events = [(step, f"event {step % 7}") for step in range(1, 10_000, 3)]
    return run


@pytest.mark.parametrize("experts", [0, 256])
def test_ten_thousand_steps_of_24_layers_stay_under_2_megabytes(experts):
    runs = [big_run(experts=experts)]
    assert len(runs[0].series) > 24 * (6 + 7 * 10)
    html = render(runs, make_figures(runs))
    assert len(html.encode()) < 2e6
    assert set(runs[0].series) - Page(html).keys == set()


def test_so_do_two_of_them_and_one_with_thousands_of_expert_matrices():
    runs = [big_run(), big_run()]
    runs[1].name = "other"
    assert len(render(runs, make_figures(runs)).encode()) < 2e6
    names = [
        f"blocks.{layer}.mlp.experts.up.weight[{e}].gate" for layer in range(8) for e in range(64)
    ]
    steps, rng = np.arange(10, 1001, 10), np.random.default_rng(0)
    runs[0].series = {
        f"optimizer/matrix/{name}/trust_ratio": Series(steps, rng.random(100)) for name in names
    }
    page = Page(render(runs[:1], make_figures(runs[:1])))
    [figure] = page.figures
    assert figure["data-rows"].split() == [
        f"blocks.{layer}.mlp.experts.up.weight[*].gate" for layer in range(8)
    ]


def test_a_run_in_progress(tmp_path):
    lines = metrics(400, layers=2)
    page, _ = report(tmp_path, lines[:123], tail='{"step": 124, "tokens": 25')
    assert "1.2% done" in page.text
    assert "of 10,000" in page.text
    assert "line 124 is cut short: skipped" in page.text
    assert curve(page, "training")[-1][0] == 123


@pytest.mark.parametrize(("steps", "words"), [(100, "diverged"), (50, "50.0% done, diverged")])
def test_a_diverged_run(tmp_path, steps, words):
    """Its loss is not finite at the end, whether or not it has reached all of its steps."""
    lines = metrics(steps)
    for line in lines[steps // 2 :]:
        line["loss"] = None
    plan = {**PLAN, "training": {**PLAN["training"], "steps": 100}}
    page, _ = report(tmp_path, lines, plan=plan)
    assert words in page.text


def test_a_run_that_has_just_started(tmp_path):
    directory = make_run(tmp_path / "run", [])
    for _ in range(2):  # with an empty metrics.jsonl, then with none
        page = Page(write_report([directory]).read_text())
        assert "no metrics yet" in page.text
        assert "none recorded" not in page.text  # of problems nothing is known yet
        assert not page.figures
        (directory / "metrics.jsonl").unlink(missing_ok=True)
    page, _ = report(tmp_path, metrics(1, layers=1), name="one")
    assert page.figures
    assert "none recorded" in page.text


def test_damaged_lines_are_skipped_and_said(tmp_path, capsys):
    lines = metrics(20, layers=1)
    directory = make_run(tmp_path / "run", lines)
    text = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    text[3:3] = [
        "\n",
        "not json\n",
        "[1]\n",
        '{"step": 4}\n',
        '{"step": null, "tokens": 1}\n',
        b"\xff\xfe".decode("latin1") + "\n",
    ]
    (directory / "metrics.jsonl").write_text("".join(text))
    (directory / "plan.json").write_text("{")
    page = Page(write_report([directory]).read_text())
    said = capsys.readouterr().err
    assert len(read_run(directory).steps) == 20
    for word in (
        "line 5 is damaged or foreign: skipped",
        "2 more such lines skipped",
        "plan.json is not readable",
    ):
        assert word in page.text
        assert f"archscale: warning: {directory}: " in said
        assert word in said


def test_of_two_lines_of_one_step_the_later_counts(tmp_path):
    lines = [{"step": s, "tokens": s, "time": 0.0, "loss": float(s)} for s in (1, 2, 3, 2)]
    lines[-1]["loss"] = 7.0
    run = read_run(make_run(tmp_path / "run", lines))
    assert run.steps.tolist() == [1, 2, 3]
    assert run.series["loss"].values.tolist() == [1.0, 7.0, 3.0]


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        ({}, "an empty directory"),
        ({"holiday.txt": "sun"}, "not a run or sweep directory.*runs/<name>"),
        ({"metrics.jsonl": "a,b\n1,2\n"}, "no line is a JSON object"),
        ({"metrics.jsonl": "[]\n{}\n"}, "no line is a JSON object"),
        ({"first/metrics.jsonl": "{}", "second/metrics.jsonl": "{}"}, "holds runs.*first, second"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, files, pattern):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=pattern):
        write_report([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_two_runs_side_by_side(tmp_path):
    other = copy.deepcopy(PLAN) | {"name": "other"}
    first = make_run(tmp_path / "a", metrics(100, layers=3))
    second = make_run(tmp_path / "b", metrics(60, layers=2, seed=1), other)
    path = write_report([first, second])
    page = Page(path.read_text())
    assert path == first / "report_and_b.html"
    assert curve(page, "made_d24, training")[-1][0] == 100
    assert curve(page, "other, training")[-1][0] == 60
    maps = [figure for figure in page.figures if figure["data-key"] == "stability/*/attention_z"]
    assert [len(figure["data-rows"].split()) for figure in maps] == [3, 2]
    assert "Config: what differs" in page.text
    assert page.text.count("Attention Z-value, every layer ·") == 2


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / name / "run", metrics(5, layers=1)) for name in ("a", "b")]
    assert len({run.name for run in read_runs(runs)}) == 2
    with pytest.raises(ArchscaleError, match="the same run twice"):
        read_runs([runs[0], tmp_path / "b" / ".." / "a" / "run"])


def test_the_plan_beside_what_was_measured(tmp_path):
    directory = make_run(tmp_path / "run", metrics(10_000, layers=1, every=1000))
    (directory / "checkpoints" / "step_00010000").mkdir(parents=True)
    (directory / "checkpoints" / "step_00010000" / "state").write_bytes(b"\0" * 11_000_000)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", write_report([directory]).read_text()))
    assert "parameters 1,000,000 1,000,000 as planned" in text
    assert "steps 10,000 10,000 as planned" in text
    assert "tokens 20,480,000 20,480,000 as planned" in text
    assert "time of a step 600 ms 500 ms 0.833 × planned" in text
    assert "a checkpoint 12 MB 11 MB of step 10000" in text.replace("10,000", "10000")
    mfu = 4096 * 6e6 / (8 * 989.4e12)
    assert f"MFU 40% assumed {100 * mfu:.2g}%" in text
    assert "finished" in text


@pytest.mark.parametrize(
    ("names", "words"),
    [((None,), "the data read 4.8 times"), (("web", "code"), "source code read 8 times")],
)
def test_memory_tokens_a_parameter_and_passes(tmp_path, names, words):
    """A run that is half done, whose windows hold an eighth of padding."""
    lines = metrics(5_000, layers=1, every=1000)
    for step, held in ((1000, 2.25e9), (2000, 2.4e9)):
        lines[step - 1]["peak_memory_bytes"] = held
    trained = PLAN["training"]["trained_tokens"]
    sources = [{"name": name, "passes": 9.6 + 6.4 * n} for n, name in enumerate(names)]
    plan = PLAN | {"data": {"real_tokens": trained * 7 // 8, "sources": sources}}
    _, html = report(tmp_path, lines, plan)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))
    assert f"8.96 a parameter; {words}" in text
    assert "memory a device 3 GB 2.4 GB peak; 0.8 × planned" in text


def test_on_a_device_without_a_known_peak_there_is_no_mfu(tmp_path):
    plan = copy.deepcopy(PLAN)
    plan["devices"] = [
        {
            "device": "cpu",
            "count": 1,
            "peak_flops": None,
            "mfu": 0.4,
            "seconds": None,
            "step_seconds": None,
        }
    ]
    _, html = report(tmp_path, metrics(20, layers=1), plan)
    assert "MFU n/a n/a the peak of cpu is not known" in re.sub(
        r"\s+", " ", re.sub(r"<[^>]+>", " ", html)
    )


def test_keys_come_apart_and_together():
    for key in metrics(10, layers=2, experts=4)[-1]:
        parsed = parse_key(key)
        assert parsed.pattern.replace("*", parsed.element or "") == key
    assert parse_key("spectrum/gradient/sigma_max").element is None
    assert (
        parse_key("spectrum/gradient/blocks.0.attention.out.weight/sigma_max").element
        == "blocks.0.attention.out.weight"
    )
    assert family("blocks.3.mlp.experts.up.weight[7].gate") == (
        "blocks.*.mlp.experts.up.weight[*].gate",
        (3, 7),
    )


def test_the_plan_of_training_has_what_the_report_reads(tmp_path):
    """The report's own sample plan would hide a key that plan.json no longer has."""
    from archscale.config import Config
    from archscale.plan.devices import DEVICES
    from archscale.plan.plan import make_plan

    config = Config.from_dict(
        {
            "name": "real",
            "data": {"train": "none"},
            "model": {"vocab_size": 512, "depth": 2, "width": 128},
        }
    )
    plan = json.loads(json.dumps(make_plan(config, device=DEVICES["h100"]).as_dict()))

    def paths(tree, prefix=""):
        return (
            {prefix}
            if not isinstance(tree, dict)
            else {p for k, v in tree.items() for p in paths(v, f"{prefix}.{k}")}
        )

    assert paths(PLAN) - paths(plan) == set()
    assert set(PLAN["devices"][0]) <= set(plan["devices"][0])
    page, _ = report(tmp_path, metrics(5, layers=2), plan)
    assert "dense model, depth 2, width 128" in page.text


def _damaged(tree):
    """The tree with each of its branches in turn replaced by what does not belong there."""
    for key in tree:
        for wrong in (None, "text", [], {}, -1, [None], True):
            yield {**tree, key: wrong}
        if isinstance(tree[key], dict):
            yield from ({**tree, key: child} for child in _damaged(tree[key]))
        elif isinstance(tree[key], list) and tree[key] and isinstance(tree[key][0], dict):
            yield from ({**tree, key: [child]} for child in _damaged(tree[key][0]))


def test_a_plan_of_another_version_or_a_foreign_one_is_no_obstacle():
    run = big_run(layers=1, steps=100)
    run.manifest, run.environment = [{"shape": ["a"]}, 3], {"device": 7, "world_size": None}
    for number, run.plan in enumerate(_damaged(PLAN)):
        assert "big" in render([run], make_figures([run]) if number % 20 == 0 else {})


def test_values_at_the_edge_of_floating_point(tmp_path):
    extremes = [0.0, -0.0, 1e-320, 1e300, -1e300, None, 5e-324, 1.0, 1.0 + 1e-15, 123456789.123]
    lines = [
        {
            "step": s,
            "tokens": s,
            "time": 1.0,
            "loss": value,
            "a": value,
            "never": None,
            "tiny": 1 + s * 1e-12,
            "group/x/m": value,
            "list": [value, 1.0],
        }
        for s, value in enumerate(extremes)
    ]
    page, _ = report(tmp_path, lines)
    assert {"loss", "a", "never", "tiny", "group/x/m", "list"} <= page.keys


def test_the_losses_of_a_mixture_share_a_chart(tmp_path):
    """A curve for each source, in the section of the losses, with its own name."""
    lines = metrics(20, layers=1)
    for line in lines:
        for name, more in (("web", 0.1), ("code.py", 0.3)):
            if "val_loss" in line:
                line[f"val_loss/{name}"] = line["val_loss"] + more
                line[f"val_bits_per_byte/{name}"] = 1.5
    make_run(tmp_path / "a", lines)
    (section, *_) = make_figures([read_run(tmp_path / "a")])
    assert section.name == "loss"
    (chart,) = [chart for chart in section.charts if "val_loss/web" in chart.keys]
    assert chart.title == "Validation loss by source of the data mixture"
    assert list(chart.keys) == ["val_loss/web", "val_loss/code.py"]
    assert [line.name for line in chart.lines] == ["web", "code.py"]
    assert chart.definition == "mean cross-entropy on held-out text; nats per token"
    (constant,) = [row for row in section.constants if "val_bits_per_byte/web" in row.key]
    assert constant.values == "1.5"


def test_the_registry_and_the_readme_name_the_same_metrics():
    """Each key of the table of metrics is in the registry, and the other way round."""
    text = (ROOT / "archscale/train/README.md").read_text().partition("| key | meaning | in |")[2]
    named: set[str] = set()
    for row in text.partition("\n\n")[0].splitlines()[2:]:
        first = ""
        for key in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            if key.startswith("_"):
                key = first.rpartition("_")[0] + key
            elif key.startswith("…"):
                key = first.rpartition("/")[0] + key[1:]
            else:
                first = key
            named.add(key)
    named -= {"step", "tokens", "time", "event", "spectrum/gradient/…"}
    known = {key for metric in REGISTRY for key in metric.keys if "*" not in key}
    assert named == known
    assert len({metric.name for metric in REGISTRY}) == len(REGISTRY)
    assert {metric.section for metric in REGISTRY} <= set(SECTIONS)
    assert all(parse_key(key).section == m.section for m in REGISTRY for key in m.keys)


def test_what_never_changes_is_listed_and_not_drawn(tmp_path):
    lines = metrics(60, layers=2, every=10)
    for line in lines:
        line |= {"steady": 0.25, "never": None, "group/x/flat": 3.0, "group/y/flat": 3.0}
        line |= {"flat_list": [1, 1], "moving": line["step"]}
    page, _ = report(tmp_path, lines)
    drawn = {key for figure in page.figures for key in figure["data-key"].split()}
    listed = {constant["data-key"] for constant in page.constants}
    flat = {"steady", "never", "group/*/flat", "flat_list", "tokens_per_second", "lr"}
    assert flat - {"lr"} <= listed
    assert not drawn & listed
    assert {"lr", "moving", "loss", "optimizer/trust_ratio_max"} <= drawn
    text = " ".join(page.text.split())
    assert "steady0.25 throughout" in text
    assert "nevernone throughout" in text


def test_many_runs_side_by_side(tmp_path):
    runs = [
        make_run(
            tmp_path / name,
            metrics(20 + 10 * number, layers=1, seed=number),
            copy.deepcopy(PLAN) | {"name": f"run {name}", "seed": number},
        )
        for number, name in enumerate("abcdefgh")
    ]
    path = write_report(runs)
    page = Page(path.read_text())
    assert path == runs[0] / "report_and_b_and_6_more.html"
    for number, name in enumerate("abcdefgh"):
        assert curve(page, f"run {name}, training")[-1][0] == 20 + 10 * number
    assert len({c["look"] for c in page.curves if c["name"].endswith(", training")}) == 8
    assert "name" in page.text.partition("Config: what differs")[2]
    head, sizes = page.text.partition("Plan beside measured")[2], ["20", "50", "90"]
    assert [size for size in sizes if f"{size} of 10,000" in " ".join(head.split())] == sizes


def test_a_map_s_colors_are_its_values(tmp_path):
    """Read back as the script does, by color; no value is transparent."""
    values = np.array([[0.0, 0.5, np.nan, 1.0], [0.25, 0.75, 0.1, 0.9]])
    scale = Scale(0.0, 1.0)
    bands, steps = [("a", 1), ("b", 1)], np.array([1, 2, 3, 4])
    heat = HeatMap("k/*", 0, "t", "", ["a", "b"], bands, values, steps).drawn(4, scale)
    kind, _, content = heat.image.partition(",")
    assert kind == "data:image/webp;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))
    assert pixels.shape == (2, 4, 4)
    assert pixels[0, 2, 3] == 0
    colors = [palette()[6 * level : 6 * level + 6] for level in range(LEVELS)]
    assert len(set(colors)) == LEVELS
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            level = colors.index(pixels[row, column, :3].tobytes().hex())
            assert abs((level + 0.5) / LEVELS - value) <= 0.5 / LEVELS + 1e-9


def test_a_very_long_list_shares_rows(tmp_path):
    lines = [
        {"step": s, "tokens": s, "loss": 1.0, "long": [float(i == 12_345) for i in range(20_000)]}
        for s in (1, 2)
    ]
    page, _ = report(tmp_path, lines)
    [figure] = [figure for figure in page.figures if figure["data-key"] == "long"]
    assert figure["data-rows"].split()[246:248] == ["12300-12349", "12350-12399"]
    [(_, heat)] = [
        (section, heat)
        for section in make_figures([read_run(tmp_path / "run")])
        for heat in section.maps
    ]
    assert np.flatnonzero(heat.table[:, 0]).tolist() == [246]


def test_the_style_has_the_colors_of_the_figures():
    css = (ROOT / "archscale" / "report" / "page.css").read_text()
    light = css.partition(":root {")[2].partition("}")[0]
    for color, variable in VARIABLES.items():
        assert f"{variable}: {color};" in light
