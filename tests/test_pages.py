"""What the pages say of the repository is there: links, paths, files of a folder; the citation."""

import re

import pytest
import yaml

import archscale
from tests.commands import ROOT
from tests.test_readme import PAGES

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
