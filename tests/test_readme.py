"""Every command block and every Python and YAML block of the pages is run as a reader would.

The pages are all tracked READMEs, and CONTRIBUTING.md. Each gets a copy of the tracked files in
which nothing is prepared, so a page that names no command for what it needs fails. Blocks run in
order; a block fenced as `text` is a listing. The tables below hold the exceptions; an entry that
matches nothing fails, so none outlives its example.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml
from typer.testing import CliRunner

from archscale.cli import app
from archscale.config import load_config
from archscale.data import missing
from archscale.data.missing import how_to_make
from archscale.data.preparing.recipe import load_recipe
from tests.commands import ROOT, launch


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()]


PAGES = [name for name in tracked_files() if Path(name).name in ("README.md", "CONTRIBUTING.md")]
SLOW_PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "archscale/checkpoint/README.md",
    "archscale/export/README.md",
    "configs/studies/README.md",
    "launch/README.md",
]

# Pattern of a command → arguments that make it small enough for a test.
SHORTER = {
    r"data prepare data_prep/python_stdlib\.yaml": (
        "--set sources.0.include_tests=false "
        "--set sources.0.weight=0.1 --set tokenizer.train.vocab_size=512"
    ),
    r"data prepare data_prep/python_stdlib_512\.yaml": (
        "--set sources.0.include_tests=false --set sources.0.weight=0.1"
    ),
    r"(train|launch/torchrun\.sh) configs/quickstart\.yaml": "--set training.tokens=8192",
    r"train configs/small/transfer\.yaml": "--set training.tokens=10240",
    r"bench train ": (
        "--rounds 2 --set training.micro_batch=1 --set model.context=64 --set model.depth=2"
    ),
    r"sweep (configs/sweeps/\w+|lr_width)\.yaml$": "--index 0 --set training.tokens=10240",
    r"study configs/studies/sqrt_gate\.yaml": (
        "--set tokens=64 --set granularities=[1,2] --set width=64 --set hidden=64"
    ),
    r"study configs/studies/hybrids\.yaml": "--set seeds=[0] --set run.training.tokens=5120",
    r"study configs/studies/spectral_flattening\.yaml": (
        "--set seeds=[0] --set tolerance=0.1 "
        "--set language.after=[0] --set language.race.steps=2 --set least_squares.exponents=[0] "
        "--set least_squares.race.steps=5"
    ),
}

# Pattern of a command or of Python → what the default suite runs in its place; None: only the slow
# tests run it.
SLOW: dict[str, str | None] = {
    r"^archscale verify-resume ": None,
    r"bench data": "bench data --tokens 200000 --context 64 --rounds 1 --step 5 --no-peers",
    r"bench checkpoint": (
        "bench checkpoint configs/quickstart.yaml --set model.vocab_size=512"
        " --set training.batch_tokens=1024 --size 0 --rounds 1 --no-peers"
    ),
    r"bench optimizer ": "bench optimizer --shape 2x32x32 --rounds 2 --no-peers",
    r"study configs/studies/spectral_flattening\.yaml": None,
    r"parallel\.engine=deepspeed": None,
    r"launch/torchrun\.sh configs/quickstart\.yaml": None,
    r"def test_rank_sum": None,
    r"import AutoModelForCausalLM": None,
}

# Pattern of a command that no test can run → why. Its syntax, its options and its files are
# checked.
NOT_RUN = {
    r"^bash launch/(quickstart|test|install)\.sh": "installs from a package index",
    r"^source \.venv/bin/activate": "the tests choose their own environment",
    r"^\.venv/bin/pytest": "this test is part of it",
    r"^archscale train my\.yaml": "needs a run of some length; tests/checkpoint/test_continuing.py",
    r"^archscale (generate|chat) (RUN|EXPORT)": "needs a run; tests/train/test_prompting.py",
    r"^archscale bench generate RUN": "needs a run; tests/bench/test_generate.py",
    r"^pip install": "installs from a package index",
    r"^docker ": "needs Docker",
    r"^NNODES=2": "needs two nodes",
    r"^HOSTFILE=": "needs nodes that ssh reaches",
    r"^sbatch ": "needs Slurm",
    r"--launcher slurm --jobs 16$": "needs Slurm",
    r"^kubectl ": "needs Kubernetes",
    r"bench gpu (all|mfu)": "needs a GPU",
    r"^bash runs/my_grid/skypilot\.sh": "needs SkyPilot and a cloud",
}

# Pattern of the first line of an indented block that is not commands.
NOT_COMMANDS = [
    r"^[MD] .*[←=] ",  # formulas
    r"^tokens \(B, T\)",  # the figure of the model
    r"^floor 7 ",  # the floors of CONTRIBUTING.md
    r"^Rule\(",  # a row of a Python table
    r"^dataset\.json ",  # files of a data set
    r"^\d+ parameters, ",  # a printed table
    r"^ATEN_CPU_CAPABILITY=",  # the whole suite, by stand-ins for other processors
]

# Page → Python that stands for what the reader's own program has.
READERS_PROGRAM = {
    "archscale/optim/examples/README.md": (
        "from archscale.optim.examples.digits import ConvNet\nmodel = ConvNet()"
    )
}

# Commands whose printed output on the page has to be what they print on any machine.
SAME_OUTPUT = [r"^archscale fit "]

COMMAND = re.compile(
    r"^(\$ )?([A-Z_]+=\S+"
    r" )*(archscale|bash|source|torchrun|docker|kubectl|sbatch|pip|\.venv/bin/\w+) "
)
CLUSTERS = ("slurm", "kubernetes", "skypilot")


class Block(NamedTuple):
    """A block of a page: `kind` is the word after the fence, or "indented"."""

    line: int
    kind: str
    text: str


class Command(NamedTuple):
    """A command of a page, its continuation lines joined; `output` is what the page says it
    prints."""

    line: int
    text: str
    output: list[str]


def blocks_of(text: str) -> Iterator[Block]:
    """Fenced blocks, and blocks indented by four columns that follow an empty line."""
    lines = [*text.splitlines(), ""]
    number = 0
    while number < len(lines):
        fence = re.match(r"^\s*(```|~~~)(\w*)", lines[number])
        indented = lines[number].startswith("    ") and not (number and lines[number - 1].strip())
        begin = number + 1
        if fence:
            number = begin
            while not lines[number].lstrip().startswith(fence[1]):
                number += 1
            yield Block(begin + 1, fence[2], "\n".join(lines[begin:number]))
        elif indented:
            while number < len(lines) and (
                lines[number].startswith("    ")
                or (
                    (not lines[number].strip() and lines[number + 1 : number + 2] != [])
                    and lines[number + 1].startswith("    ")
                )
            ):
                number += 1
            content = "\n".join(line[4:] for line in lines[begin - 1 : number])
            yield Block(begin, "indented", content)
            continue
        number += 1


def commands_of(block: Block) -> list[Command]:
    """Where a line starts with `$ `, the others are output."""
    with_prompt = block.text.startswith("$ ")
    commands: list[Command] = []
    pending, start = "", 0
    for number, line in enumerate(block.text.splitlines(), block.line):
        if with_prompt and not pending and not line.startswith("$ "):
            commands[-1].output.append(line)
            continue
        start = start if pending else number
        pending += line.removeprefix("$ ") if with_prompt else line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        text = " ".join(shlex.split(pending, comments=True)) and pending
        if text.strip():
            commands.append(Command(start, _without_comment(text), []))
        pending = ""
    assert not pending, f"line {start} continues after the end of the block"
    return commands


def _without_comment(text: str) -> str:
    return re.sub(r"\s+#\s.*$", "", text).strip()


def is_commands(block: Block) -> bool:
    return block.kind in ("bash", "sh", "console") or (
        block.kind == "indented" and COMMAND.match(block.text + " ") is not None
    )


def lookup(table: dict[str, str] | dict[str, str | None], text: str) -> str | None:
    """The one pattern of the table that the command matches."""
    found = [pattern for pattern in table if re.search(pattern, text)]
    assert len(found) <= 1, f"{text}: {found} all match"
    return found[0] if found else None


def archscale_arguments(words: list[str]) -> list[str] | None:
    """The arguments of `archscale` within a longer command line; None where it is not called."""
    words = [word for word in words if not re.match(r"^[A-Z_]+=", word)] if words else words
    for name in ("launch/torchrun.sh", "launch/deepspeed.sh", "launch/slurm.sbatch"):
        if name in words:
            return ["train", *words[words.index(name) + 1 :]]
    names = [i for i, word in enumerate(words) if word == "archscale"]
    if not names or (words[0] == "docker" and words[1] == "build"):
        return None
    return words[names[-1] + 1 :]


def check_arguments(arguments: list[str]) -> None:
    """Fails where the CLI has no such command or option; starts nothing."""
    command = typer.main.get_command(app)
    context = command.make_context("archscale", list(arguments))
    while hasattr(command, "commands"):
        words = [*context._protected_args, *context.args]
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, words, parent=context)


class Reader:
    """Does what a page says, in a copy of the tracked files."""

    def __init__(self, page: str, folder: Path, everything: bool):
        self.page, self.folder, self.everything = page, folder, everything
        self.namespace: dict[str, object] = {"__name__": "example"}
        self.grid = ""

    def read(self) -> None:
        for block in blocks_of((ROOT / self.page).read_text()):
            where = f"{self.page}:{block.line}"
            if is_commands(block):
                for command in commands_of(block):
                    self.command(f"{self.page}:{command.line}", command)
            elif block.kind == "python":
                self.python(where, block.text)
            elif block.kind == "yaml":
                self.yaml(where, block.text)
            elif block.kind != "text":
                known = any(re.search(pattern, block.text) for pattern in NOT_COMMANDS)
                assert known, f"{where}: neither commands nor in NOT_COMMANDS:\n{block.text}"

    def python(self, where: str, text: str) -> None:
        if "def test_" in text:
            if not self.everything:
                assert lookup(SLOW, text), f"{where}: a test in a page is run by the slow tests"
                compile(text, where, "exec")
                return
            (self.folder / "tests" / "test_example.py").write_text(text)
            self.process(where, [sys.executable, "-m", "pytest", "tests/test_example.py"])
            return
        if lookup(SLOW, text) and not self.everything:
            compile(text, where, "exec")
            return
        exec(READERS_PROGRAM.get(self.page, ""), self.namespace)
        exec(compile(text, where, "exec"), self.namespace)

    def yaml(self, where: str, text: str) -> None:
        content = yaml.safe_load(text)
        if "axes" in content:
            (self.folder / f"{content['name']}.yaml").write_text(text)
        elif "sources" in content:
            (self.folder / "recipe.yaml").write_text(text)
            load_recipe(self.folder / "recipe.yaml")
        elif "data" in content:
            path = self.folder / "configs" / f"{content['name']}.yaml"
            path.write_text(text)
            load_config(path)
        else:  # what a grid needs for a cluster: below the grid of README
            assert set(content) & set(CLUSTERS), f"{where}: neither grid, recipe nor config"
            grid = (block.text for block in blocks_of((ROOT / "README.md").read_text()))
            grid = next(text for text in grid if text.startswith("name: lr_width"))
            own = grid.replace("name: lr_width", "name: my_grid")
            # A sequence for each of the 8 processes of a run: one at a time.
            own = own.replace("derive: {", "derive: {training.micro_batch: 1, ") + "\n" + text
            (self.folder / "my_grid.yaml").write_text(own)
            prepare = "archscale data prepare data_prep/python_stdlib_512.yaml"
            self.command(where, Command(0, prepare, []))  # the readers of this page have their data

    def command(self, where: str, command: Command) -> None:
        text = command.text
        checked = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
        assert checked.returncode == 0, f"{where}: {checked.stderr}"
        if lookup(NOT_RUN, text):
            self.check(where, text)
            return
        pattern = lookup(SLOW, text)
        if pattern and not self.everything:
            self.check(where, text)
            if SLOW[pattern] is None:
                return
            text = f"archscale {SLOW[pattern]}"
        if pattern := lookup(SHORTER, text):
            text = f"{text} {SHORTER[pattern]}"
        names = [path.stem for path in sorted(Path("configs/sweeps").glob("*.yaml"))]
        if "--dry-run" not in text:
            names = ["lr_transfer"]  # the others set training.tokens, so --set cannot cut them
        for name in names if "NAME" in text else [""]:
            printed = self.run(where, text.replace("NAME", name))
        if any(re.search(pattern, text) for pattern in SAME_OUTPUT):
            expected = [line.rstrip() for line in command.output]
            assert printed.rstrip().splitlines() == expected, f"{where}: prints\n{printed}"

    def run(self, where: str, text: str) -> str:
        words = shlex.split(text)
        if words[0] == "archscale":
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, f"{where}: {text}\n{done.output}\n{done.exception!r}"
            return done.stdout
        if words[0] == "torchrun":
            processes = int(re.search(r"--nproc_per_node=(\d)", text)[1])
            assert words[1:5] == [*words[1:3], "-m", "archscale"], f"{where}: {text}"
            return launch(words[5:], processes=processes, cwd=self.folder).stdout
        return self.process(where, ["bash", "-c", text])

    def process(self, where: str, words: list[str]) -> str:
        env = os.environ | {
            "PYTHONPATH": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        done = subprocess.run(
            words, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{where}: {words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def check(self, where: str, text: str) -> None:
        """Check the options of a command that is not run, and that the files it names exist."""
        words = shlex.split(text)
        if (arguments := archscale_arguments(words)) is not None:
            try:
                check_arguments(arguments)
            except Exception as error:
                pytest.fail(f"{where}: {text}: {error!r}")
        for word in words:
            if re.match(r"^(launch|configs|data_prep|docker|runs|archscale)/\S*\w$", word):
                assert (self.folder / word).exists(), f"{where}: no file {word}"
            if word.endswith(".sh") and (self.folder / word).is_file():
                subprocess.run(["bash", "-n", self.folder / word], check=True)


def copy_checkout(folder: Path) -> Path:
    """The tracked files, and the configs of their own that readers of the pages have."""
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for own in ("my.yaml", "configs/my.yaml"):
        shutil.copy(folder / "configs" / "quickstart.yaml", folder / own)
    return folder


def read(page: str, folder: Path, everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy_checkout(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Reader(page, folder, everything).read()


@pytest.mark.timeout(400)  # the commands of README take half a minute on two quiet cores
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page, tmp_path, monkeypatch):
    read(page, tmp_path, False, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES)
def test_the_long_examples_run(page, tmp_path, monkeypatch):
    read(page, tmp_path, True, monkeypatch)


def all_texts() -> list[str]:
    """Every command, and every block that is not commands, of all pages."""
    texts = []
    for block in itertools.chain.from_iterable(blocks_of((ROOT / p).read_text()) for p in PAGES):
        texts += [c.text for c in commands_of(block)] if is_commands(block) else [block.text]
    return texts


def test_no_exception_is_left_over():
    assert {"README.md", "CONTRIBUTING.md", *SLOW_PAGES} <= set(PAGES)
    texts = all_texts()
    for pattern in [*SHORTER, *SLOW, *NOT_RUN, *NOT_COMMANDS, *SAME_OUTPUT]:
        pages = [text for text in texts if re.search(pattern, text)]
        assert pages, f"no example matches {pattern}"
    for page in READERS_PROGRAM:
        kinds = Counter(block.kind for block in blocks_of((ROOT / page).read_text()))
        assert kinds["python"], f"no Python in {page}"


def cli_commands(group=None, prefix: str = "") -> Iterator[str]:
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from cli_commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_readme_names_the_commands_that_there_are():
    commands = set(cli_commands())
    readme = (ROOT / "README.md").read_text()
    unnamed = {name for name in commands if not re.search(rf"archscale {name}\b", readme)}
    assert not unnamed
    for page in PAGES:
        spans = re.findall(r"`(archscale [^`…]+)`", (ROOT / page).read_text())
        for span in spans:
            words = shlex.split(span.replace(" N", " 0"))[1:]
            full = " ".join(words[:2]) if words[0] in ("data", "bench", "checkpoint") else words[0]
            assert full in commands, f"{page}: {span}"
            given = [word for word in words if word.startswith("-")]
            shown = CliRunner().invoke(app, [*full.split(), "--help"], env={"COLUMNS": "300"})
            assert all(option in shown.output for option in given), f"{page}: {span}"


def test_the_figures_of_the_quickstart_are_its_own():
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    target = re.search(r"^TARGET_LOSS=(\S+)", script, re.M)[1]
    assert f"asserts that the loss is below {target}" in readme
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    assert f"{float(config['training']['tokens']) / 1e6:g}M tokens" in readme


def test_a_missing_data_set_names_the_recipe_and_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(copy_checkout(tmp_path))
    made = {"data/python_stdlib": "python_stdlib", "data/python_stdlib_512": "python_stdlib_512"}
    for directory, recipe in made.items():
        remedy = f"make it with `archscale data prepare data_prep/{recipe}.yaml`"
        assert how_to_make(Path(directory)) == remedy
        assert how_to_make(tmp_path / directory) == remedy
    for command, recipe in {
        "train configs/quickstart.yaml": "python_stdlib",
        "plan configs/quickstart.yaml": "python_stdlib",
        "data inspect data/python_stdlib": "python_stdlib",
        "data verify data/python_stdlib_512": "python_stdlib_512",
        "sweep configs/sweeps/lr_tokens.yaml --dry-run": "python_stdlib_512",
    }.items():
        done = CliRunner().invoke(app, command.split())
        said = f"{done.output}{done.stderr}{done.exception}"
        assert done.exit_code, command
        assert f"`archscale data prepare data_prep/{recipe}.yaml`" in said, command


def test_a_data_set_without_a_recipe_is_not_promised_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "write a recipe with `output: data/mine`" in how_to_make(Path("data/mine"))
    assert str(ROOT / "data_prep" / "README.md") in how_to_make(Path("data/mine"))
    monkeypatch.setattr(missing, "CHECKOUT", tmp_path)  # as in an installation from a package
    assert "not installed here" in how_to_make(Path("data/python_stdlib"))
    (tmp_path / "data_prep").mkdir()
    (tmp_path / "data_prep" / "a.yaml").write_text("half: [written")
    (tmp_path / "data_prep" / "my own.yaml").write_text("output: data/mine\n")
    made = "make it with `archscale data prepare 'data_prep/my own.yaml'`"
    assert how_to_make(Path("data/mine")) == made
