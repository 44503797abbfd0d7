"""What a folder of checkpoints holds, by `state.json` and the sizes of files alone: nothing is
loaded, so that a list of large checkpoints is there at once."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale.checkpoint.changes import Origins
from archscale.checkpoint.directory import checkpoint_id, read_state, recorded_files, wrong_size
from archscale.checkpoint.place import Place, StorePath, checkpoints_of, unfinished_in
from archscale.config import Config
from archscale.errors import CheckpointError, ConfigError
from archscale.files import ABANDONED, CHECKPOINTS, METRICS
from archscale.terminal import table

STEP = re.compile(r"step_(\d+)")
HIDDEN = re.compile(r"\.step_\d+\..+")  # not finished: being written, or being deleted
LINE = re.compile(rb'\{"step": (\d+),')  # how a line of metrics.jsonl begins
NOTHING = "-"


@dataclass(frozen=True)
class Folder:
    """A folder with directories `step_…`, and the file with the metrics of their steps.

    Attributes:
        run_dir: of the run that the checkpoints belong to; the folder itself where there is none.
    """

    path: Place
    metrics: Place
    run_dir: Place

    def checkpoints(self) -> list[Place]:
        """Its checkpoints in order of step, also those that have lost their `state.json`; but in a
        store such a one is not finished."""
        unfinished = self.remains() if isinstance(self.path, StorePath) else []
        named: dict[Place, int] = {
            path: int(match[1])
            for path in self.path.iterdir()
            if (match := STEP.fullmatch(path.name)) and path.is_dir() and path not in unfinished
        }
        return sorted(named, key=named.__getitem__)

    def remains(self) -> Sequence[Place]:
        """Directories that a killed process did not finish writing or deleting."""
        if isinstance(self.path, StorePath):
            return unfinished_in(self.path)
        return sorted(path for path in self.path.iterdir() if HIDDEN.fullmatch(path.name))


def folder_of(directory: Place) -> Folder:
    """The checkpoints of a run directory, wherever it has them, or of a folder that is named
    itself.

    Raises:
        CheckpointError: there are none.
    """
    of_run = directory / CHECKPOINTS
    if isinstance(directory, Path):
        of_run = checkpoints_of(directory)
    if of_run.is_dir():
        return Folder(of_run, directory / METRICS, directory)
    folder = Folder(directory, directory / METRICS, directory)
    if not directory.is_dir() or not (folder.checkpoints() or folder.remains()):
        what = "this is a checkpoint" if (directory / "state.json").is_file() else "no checkpoints"
        raise CheckpointError(
            what, str(directory), "name a run directory, or a folder with directories step_…"
        )
    if isinstance(directory, StorePath):
        return folder
    if directory.resolve().name == CHECKPOINTS:
        run_dir = directory.resolve().parent
        return Folder(directory, run_dir / METRICS, run_dir)
    if directory.resolve().parent.name == ABANDONED:
        return Folder(directory, directory / METRICS, directory.resolve().parents[1])
    return folder


def disk_size(path: Place) -> int:
    """Bytes of all files in a directory, as far as they can be seen."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def list_checkpoints(directory: Place) -> dict[str, Any]:
    """`checkpoints`, in order of step, and what else there is: checkpoints in `abandoned` and
    `unfinished` directories; plain data.

    Raises:
        CheckpointError: `directory` holds no checkpoints.
    """
    folder = folder_of(directory)
    left: list[dict[str, Any]] = []
    for aside in dict.fromkeys((folder.run_dir / ABANDONED, folder.path / ABANDONED)):
        if folder.path.parent == aside or not aside.is_dir():
            continue
        for path in sorted(path for path in aside.iterdir() if path.is_dir()):
            left += _rows(Folder(path, path / METRICS, folder.run_dir))
    unfinished = [
        {"path": str(path), "bytes": disk_size(path), "written": _written(path)}
        for path in folder.remains()
    ]
    return {"checkpoints": _rows(folder), "abandoned": left, "unfinished": unfinished}


def _rows(folder: Folder) -> list[dict[str, Any]]:
    paths = folder.checkpoints()
    lines = _lines_of(folder.metrics, {int(path.name[5:]) for path in paths})
    return [_row(path, lines.get(int(path.name[5:]), {})) for path in paths]


def _lines_of(metrics: Place, steps: set[int]) -> dict[int, dict[str, Any]]:
    """The lines of these steps; the others, of which there may be millions, are not parsed."""
    lines: dict[int, dict[str, Any]] = {}
    if isinstance(metrics, StorePath):
        return {}  # a run writes them into its run directory
    with contextlib.suppress(OSError), open(metrics, "rb") as stream:
        for line in stream:
            match = LINE.match(line)
            if match and int(match[1]) in steps:
                with contextlib.suppress(ValueError):  # a crash has cut it short
                    lines[int(match[1])] = json.loads(line)
    return lines


def _row(path: Place, line: Mapping[str, Any]) -> dict[str, Any]:
    """One checkpoint; what its files do not tell is null."""
    row: dict[str, Any] = {"path": str(path), "step": int(path.name[5:]), "tokens": None}
    row |= {key: line.get(key) for key in ("loss", "val_loss")}
    row |= {"bytes": disk_size(path), "processes": None, "written": _written(path), "id": None}
    row |= {"parent": None, "not_finite_since": None, "problem": None}
    try:
        state = read_state(path)
        files = recorded_files(state).items()
        problems = [wrong_size(path / name, recorded) for name, recorded in files]
        named = {"id": checkpoint_id(state), "parent": state.get("parent")}
    except CheckpointError as error:
        return row | {"problem": error.what}
    except (AttributeError, KeyError, TypeError) as error:
        return row | {"problem": f"state.json is damaged: {type(error).__name__}: {error}"}
    problem = next(filter(None, problems), None)
    row |= {"tokens": _tokens(state, row["step"]) or line.get("tokens"), **named}
    row |= {"processes": state.get("world_size"), "problem": problem}
    return row | {"not_finite_since": state.get("not_finite_since")}


def _tokens(state: Mapping[str, Any], step: int) -> int | None:
    """Tokens of the first `step` steps; None where another version wrote the config."""
    try:
        config = Config.from_dict(state["config"])
    except (ConfigError, KeyError, TypeError):
        return None
    return Origins.of_state(state).batches(config.batches).at(step)[0] * config.model.context


def _written(path: Place) -> str | None:
    """UTC, by the file system's clock."""
    for file in (path / "state.json", path):
        with contextlib.suppress(OSError):
            return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(file.stat().st_mtime))
    return None


def render_list(found: Mapping[str, Any]) -> str:
    """`list_checkpoints` as text for people."""
    blocks = [table([list(HEAD), *map(_cells, found["checkpoints"])])]
    if not found["checkpoints"]:
        blocks = [["no checkpoints"]]
    if found["abandoned"]:
        head = "abandoned by --resume, never loaded again unless named:"
        rows = [[row["path"], *_cells(row)] for row in found["abandoned"]]
        blocks.append([head, *table([["path", *HEAD], *rows])])
    if found["unfinished"]:
        head = "being written, or left unfinished and deleted when the run goes on:"
        rows = [
            [row["path"], _megabytes(row["bytes"]), row["written"] or NOTHING]
            for row in found["unfinished"]
        ]
        blocks.append([head, *table([["path", "size", "written (UTC)"], *rows])])
    return "\n\n".join("\n".join(block) for block in blocks)


HEAD = (
    *("step", "tokens", "loss", "val_loss", "size", "processes"),
    *("written (UTC)", "id", "parent", "finite", "files"),
)


def _cells(row: Mapping[str, Any]) -> list[str]:
    since = row["not_finite_since"]
    parent = row["parent"]
    finite = "yes" if since is None else f"no, since step {since}"
    return [
        str(row["step"]),
        NOTHING if row["tokens"] is None else f"{row['tokens']:,}",
        *(NOTHING if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "val_loss")),
        _megabytes(row["bytes"]),
        str(row["processes"] or NOTHING),
        row["written"] or NOTHING,
        row["id"] or NOTHING,
        f"step {parent['step']}" if parent else NOTHING,
        NOTHING if row["id"] is None else finite,
        row["problem"] or "all there",
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
