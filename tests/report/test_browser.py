"""The report in a real browser: no errors, ink in every figure, on a phone, in the dark, on paper,
without JavaScript."""

import base64
import copy
import itertools
import re
import subprocess

import pytest

from archscale.report.plot import ticks
from archscale.report.scale import Scale
from archscale.sweep.pages import write_report
from tests.report.browser import Browser, find_browser
from tests.report.made import PLAN, make_run, metrics
from tests.report.made_sweep import LR, make_sweep, write_grid

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium on this machine (apt-get install chromium)"
)

STEPS = 900  # enough for curves with a running mean
# For each figure's plot: how many pixels of a screenshot have a color, which grid, frame and
# background have not.
INK = """(async (png, top) => {
  const image = new Image(); image.src = 'data:image/png;base64,' + png; await image.decode();
  const canvas = document.createElement('canvas');
  const g = canvas.getContext('2d', {willReadFrequently: true});
  canvas.width = image.width; canvas.height = image.height; g.drawImage(image, 0, 0);
  return [...document.querySelectorAll('%s')].map(figure => {
    const box = figure.querySelector('svg').getBoundingClientRect();
    const d = g.getImageData(box.x + scrollX, box.y + scrollY - top, box.width, box.height).data;
    let count = 0;
    for (let i = 0; i < d.length; i += 4) {
      const rgb = d.slice(i, i + 3);
      count += Math.max(...rgb) - Math.min(...rgb) > 40;
    }
    return [figure.dataset.key, count, box.width, box.height];
  });
})('%s', %d)"""
SLICE = 8000  # pixels of a page that one screenshot takes
LABELS = """[...document.querySelectorAll('.xs span, .line ~ .xs span, .ys span')]
  .filter(s => !s.closest('.map .ys'))
  .map(s => [s.textContent, parseFloat(s.style.left || s.style.top), s.className])"""
STAYS = """[...document.querySelectorAll('.scroll')].filter(box => {
  const cell = box.querySelector('tbody th');
  if (!cell || box.scrollWidth <= box.clientWidth) return false;
  box.scrollLeft = 60;
  return Math.abs(cell.getBoundingClientRect().left - box.getBoundingClientRect().left) > 1;
}).map(box => box.textContent.slice(0, 80))"""
CENTER = """(key => {
  const svg = document.querySelector(`figure[data-key="${key}"] svg`);
  svg.scrollIntoView({block: 'center'});
  const box = svg.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })('%s')"""


@pytest.fixture(scope="module")
def lines():
    return metrics(STEPS, layers=3, every=5, experts=4)


@pytest.fixture(scope="module")
def page(tmp_path_factory, lines):
    return write_report([make_run(tmp_path_factory.mktemp("one") / "run", lines)])


@pytest.fixture(scope="module")
def two(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("two")
    other = metrics(STEPS // 2, layers=2, every=5, seed=1)
    for line in other:
        line["tokens"] *= 4
    other[40] |= {"event": "update skipped", "grad_norm": None}
    second = make_run(
        folder / "b",
        other,
        copy.deepcopy(PLAN) | {"name": "a_run_with_a_name_that_is_long_enough_to_wrap"},
    )
    return write_report([make_run(folder / "a", lines), second])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    axes = {"model.width": [32, 64, 128], LR: [0.01, 0.02, 0.04, 0.08]}
    grid = write_grid(folder, axes=axes, derive={"model.aspect": None}, seeds=2)
    return write_report([make_sweep(folder / "s", grid)])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def assert_ink(browser, figures, drawn="figure"):
    shots = [
        base64.b64encode(browser.screenshot(top, SLICE)).decode()
        for top in range(0, browser.height(), SLICE)
    ]
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    seen = [
        browser.evaluate(INK % (drawn, png, number * SLICE)) for number, png in enumerate(shots)
    ]
    found = [
        [key, sum(one[n][1] for one in seen), *size] for n, (key, _, *size) in enumerate(seen[0])
    ]
    assert len(found) == figures or drawn != "figure"
    assert found
    assert [row for row in found if row[1] < 60 or row[2] < 120 or row[3] < 40] == []


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"scheme": "dark"},
        {"width": 375, "height": 800},
        {"width": 320, "height": 600, "scheme": "dark"},
        {"media": "print", "scheme": "dark", "width": 720},
        {"script": False},
    ],
    ids=["desktop", "dark", "phone", "small phone", "print", "no script"],
)
@pytest.mark.parametrize("which", ["page", "two"])
def test_every_figure_has_ink(browser, request, which, how):
    path = request.getfixturevalue(which)
    browser.messages.clear()
    browser.requests.clear()
    browser.open(path, **how)
    drawn = "figure" if how.get("script", True) else "figure.map"  # curves need the script
    assert_ink(browser, path.read_text().count("<figure"), drawn)
    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith(("data:", path.as_uri()))] == []
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= how.get("width", 1280)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = how.get("scheme") == "dark" and how.get("media") != "print"
    assert background == ("rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)")
    shown = browser.evaluate(
        "getComputedStyle(document.getElementById('controls')).display != 'none'"
    )
    assert shown == ("media" not in how and how.get("script", True))


def test_the_switches_redraw_and_bring_everything_back(browser, two):
    """That labels come back as they were also holds the script's numbers together with Python's."""
    browser.open(two)
    paths = "[...document.querySelectorAll('.plot path')].map(path => path.getAttribute('d'))"
    before, drawn = browser.evaluate(LABELS), browser.evaluate(paths)

    def switch(name, value):
        browser.evaluate(f"document.querySelector('input[name={name}][value={value}]').click()")
        return browser.evaluate(LABELS)

    by_tokens = switch("x", "tokens")
    assert "2M" in [text for text, _, _ in by_tokens]
    assert by_tokens != before
    assert browser.evaluate(paths) != drawn
    assert switch("x", "flops") != by_tokens
    assert switch("y", "log") != before
    assert_ink(browser, two.read_text().count("<figure"))
    switch("x", "step")
    assert switch("y", "linear") != before
    after = switch("y", "auto")
    assert [(text, side) for text, _, side in after] == [(text, side) for text, _, side in before]
    assert [place for _, place, _ in after] == pytest.approx(
        [place for _, place, _ in before], abs=0.1
    )
    assert browser.evaluate(paths) == drawn
    assert browser.messages == []


EXTREMES = [0.0, -0.0, 1e-320, 1e300, -1e300, None, 5e-324, 1.0, 123456789.123]


@pytest.mark.parametrize("which", ["one step", "extremes", "no plan", "all beside an empty one"])
def test_strange_runs_are_drawn_on_every_axis(browser, tmp_path, which):
    """No axis without an end, no coordinate that is not a number."""
    lines = {
        "one step": metrics(1, layers=2, experts=2),
        "extremes": [
            {"step": s, "tokens": s, "time": 1.0, "loss": y, "group/x/m": y, "list": [y, 1.0]}
            for s, y in enumerate(EXTREMES)
        ],
        "no plan": metrics(30, layers=2),
    }
    runs = [
        make_run(tmp_path / name, own, None if name == "no plan" else PLAN)
        for name, own in lines.items()
    ]
    chosen = [run for run in runs if run.name == which] or [*runs, make_run(tmp_path / "e", [])]
    browser.messages.clear()
    browser.open(write_report(chosen))
    for name, value in itertools.product("xy", ("tokens", "flops", "log", "linear", "step")):
        browser.evaluate(f"document.querySelector('input[name={name}][value={value}]')?.click()")
        paths = "[...document.querySelectorAll('.plot path')].map(path => path.getAttribute('d'))"
        drawn = browser.evaluate(paths)
        assert len(drawn) > 2
        assert not [d for d in drawn if "NaN" in d or "Infinity" in d]
    assert browser.messages == []


def test_the_script_writes_ticks_as_the_figures_do(browser, page):
    """Labels of the same axis, in numbers as `archscale.report.scale` writes them."""
    browser.open(page)
    shown = browser.evaluate(LABELS.replace(".xs span", "figure.wide .xs span"))
    steps = [text for text, _, _ in shown if text.isdigit() and int(text) % 100 == 0]
    assert steps[:9] == [text for _, text in ticks(Scale(1, STEPS), 7) if text != "0"][:9]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_sweep_s_page_fits_and_says_nothing(browser, sweep, width, scheme):
    browser.messages.clear()
    browser.requests.clear()
    browser.open(sweep, width=width, scheme=scheme)
    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith(("data:", sweep.as_uri()))] == []
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
    # Wide tables scroll inside, and their first column stays.
    assert browser.evaluate(STAYS) == []
    boxes = browser.evaluate(
        "[...document.querySelectorAll('svg.figure')].map(svg => svg.getBoundingClientRect().width)"
    )
    assert min(boxes) >= 300


@pytest.mark.parametrize(("x", "y"), [("step", "auto"), ("tokens", "log")])
def test_the_read_out_says_what_was_measured(browser, page, lines, x, y):
    browser.open(page)
    for name, value in (("x", x), ("y", y)):
        browser.evaluate(f"document.querySelector('input[name={name}][value={value}]').click()")
    left, top, width, height = browser.evaluate(CENTER % "loss val_loss")
    browser.move(left + 0.41 * width, top + height / 2)
    text = browser.evaluate("document.getElementById('tip').innerText")
    step = int(re.search(r"step (\d+)", text).group(1))
    assert abs(step - 0.41 * STEPS) < 4
    assert float(re.search(r"training ([\d.]+)", text).group(1)) == pytest.approx(
        lines[step - 1]["loss"], rel=1e-3
    )

    assert float(re.search(r"mean around it ([\d.]+)", text).group(1)) == pytest.approx(
        2.5 + 8 * step**-0.3, abs=0.1
    )

    left, top, width, height = browser.evaluate(CENTER % "stability/*/attention_z")
    browser.move(left + 0.7 * width, top + 0.5 * height)  # the second of three layers
    text = browser.evaluate(
        "new Promise(done => setTimeout(() => done(document.getElementById('tip').innerText), 200))"
    )
    found = re.search(r"layer_01: ≈ ([\d.]+)\s+from step (\d+)", text)
    measured = lines[5 * -(-int(found.group(2)) // 5) - 1]["stability/layer_01/attention_z"]
    assert float(found.group(1)) == pytest.approx(measured, rel=0.02)
    browser.move(2, 2)
    assert browser.evaluate("document.getElementById('tip').hidden")


def test_it_prints(browser, two, tmp_path):
    browser.open(two)
    browser.pdf(tmp_path / "report.pdf")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 40


def test_no_browser_is_left_behind(tmp_path):
    browser = Browser(tmp_path)
    browser.close()
    assert browser.process.poll() is not None
    running = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    assert str(tmp_path) not in running
