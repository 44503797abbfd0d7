"""What the pages say of the repository is there: links, paths, files of a folder; the citation."""

import math
import re

import pytest
import yaml

import archscale
from archscale.rules import RULES
from tests.commands import ROOT
from tests.test_readme import PAGES
from tests.train.tiny import config, run, tiny_data

READING_ORDER = "| file, in reading order |"  # heads the table of all files of a folder
PACKAGE_PAGES = [page for page in PAGES if page.startswith("archscale/")]
# Paths in backticks: `configs/quickstart.yaml`, `archscale/plan/transfer.py`, `tests/train`. Those
# with placeholders (<name>, …, NAME, step_00001000) are none.
TRACKED = r"`((?:archscale|configs|data_prep|docker|launch|tests)/[\w/.-]*)`"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
                known = {
                    re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings
                }
                assert anchor in known, f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_backticks_exist(page):
    for path in re.findall(TRACKED, (ROOT / page).read_text()):
        assert (ROOT / path).exists() or "NAME" in path, f"{page}: no {path}"


@pytest.mark.parametrize("page", PACKAGE_PAGES)
def test_the_reading_order_has_every_file(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    if READING_ORDER not in text:
        return
    table = text.partition(READING_ORDER)[2].partition("\n\n")[0]
    listed = set(re.findall(r"`(\w+\.py)`", table))
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert files <= listed, f"{page} leaves out {files - listed}"
    inner = {path.name for path in folder.rglob("*.py")}
    assert listed <= inner, f"{page} has files that are not there: {listed - inner}"


def test_every_room_of_the_package_is_on_its_page():
    text = (ROOT / "archscale" / "README.md").read_text()
    for path in (ROOT / "archscale").iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert f"`{path.name}`" in text
        elif (path / "__init__.py").is_file():
            assert f"`{path.name}/`" in text


def test_the_main_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 300


def test_the_citation():
    """The keys that version 1.2.0 of the format requires, and what it says of us and of papers."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"] == "archscale"
    assert citation["authors"] == [{"name": "The archscale developers"}]
    assert citation["version"] == archscale.__version__
    readme = (ROOT / "README.md").read_text()
    assert len(citation["references"]) == 3
    for paper in citation["references"]:
        number = paper["url"].removeprefix("https://arxiv.org/abs/")
        assert paper["identifiers"][0]["value"] == f"arXiv:{number}"
        assert paper["type"]
        assert paper["title"]
        assert paper["authors"]
        assert f"[arXiv {number}](https://arxiv.org/abs/{number})" in readme


def test_the_table_of_rules_is_that_of_the_code():
    """README.md's, row by row; a factor s by its formula at two shapes."""
    lines = (ROOT / "README.md").read_text().split("| rule | direction |")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = rows[: rows.index([""])]
    assert [row[0].strip("`") for row in rows] == list(RULES)
    directions = {
        "orthogonal": "orthogonal",
        "Adam": "adam",
        "sign": "lion",
        "momentum": "momentum",
    }
    denominators = {"–": None, "‖D‖": "update", "‖Q‖": "direction", "‖M̂‖": "momentum"}
    for name, direction, s, ratio, c, decay, clip, constraint in rows:
        rule = RULES[name.strip("`")]
        assert directions.get(direction, direction) == rule.direction
        for m, n in ((6, 2), (2, 6)):
            shown = re.sub(r"√\(?(max\(.*\)|m/n)\)?", r"math.sqrt(\1)", s)
            shown = shown.replace("0.2 ", "0.2 * ")
            value = eval(shown, {"math": math, "m": m, "n": n, "max": max})
            assert value == pytest.approx(rule.shape_factor(m, n)), name
        assert denominators[re.sub(r"^‖W‖ / \(?(c )?(‖[^‖]+‖)\)?$", r"\2", ratio)] == rule.ratio
        assert (c == "calibrated") == rule.calibrated
        assert decay == rule.decay
        assert clip == ("–" if rule.clip is None else f"[{rule.clip[0]:g}, {rule.clip[1]:g}]")
        assert (constraint == "sphere") == rule.sphere


def metrics_in_the_table() -> set[str]:
    """Keys in archscale/train/README.md; `_min` and `…/x` go on from the key before them."""
    text = (ROOT / "archscale" / "train" / "README.md").read_text()
    table = text.partition("| key | meaning | in |")[2].partition("\n\n")[0]
    keys: list[str] = []
    for row in table.splitlines()[2:]:
        for key in re.findall(r"`([^`]+)`", row.split("|")[1]):
            if key.startswith("_"):
                key = keys[-1].rpartition("_")[0] + key
            keys.append(
                key.replace("…/", keys[-1].rpartition("/")[0] + "/") if key[0] == "…" else key
            )
    gradient = {f"spectrum/gradient/{key.rpartition('/')[2]}" for key in keys if "spectrum" in key}
    return {*keys, *gradient} - {"spectrum/gradient/…"}


def test_the_table_of_metrics_has_what_a_run_writes(tmp_path):
    """With experts, spectra, padding, validation; on one process, so without stragglers."""
    moe = {"sparsity": 2, "top_k": 2}
    sections = {
        "data": {"packing": "best_fit"},
        "model": {"moe": moe},
        "telemetry": {"every": 2, "spectrum_every": 2, "per_layer": False},
        "training": {"ema": 0.9},
    }
    lines = run(config(tiny_data(tmp_path), "orscale_lm", 2, **sections), str(tmp_path / "run"))
    written = {key for line in lines for key in line}
    listed = metrics_in_the_table()
    assert written <= listed, written - listed
    elsewhere = {"event", "mfu", "straggler/rank", "straggler/wait_seconds", "eval/<task>/<metric>"}
    not_written = listed - written - elsewhere
    assert not not_written, not_written
