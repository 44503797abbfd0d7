"""From a study's file to its directory of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from archscale.config.layers import write_yaml
from archscale.errors import ConfigError, explain_os_error
from archscale.study.config import GateStudy, HybridStudy, SpectralStudy, load_study
from archscale.study.gates import run_gates
from archscale.study.hybrids import run_hybrids
from archscale.study.output import table_text, write
from archscale.study.spectral import run_spectral


def run_study(
    path: Path, overrides: Sequence[str], out: Path | None, say: Callable[[str], None]
) -> Path:
    """Run the study of a file; returns the directory of the results, by default runs/<name>.

    Raises:
        ArchscaleError: a user's error.
    """
    study = load_study(path, overrides)
    directory = out or Path("runs") / study.name
    try:  # before anything is computed
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").touch()
    except OSError as error:
        cause, remedy = explain_os_error(error, "give another with --out")
        raise ConfigError(f"cannot write the results: {cause}", str(directory), remedy) from error
    write_yaml(study.model_dump(mode="json", by_alias=True), directory / "study.yaml")
    started = time.monotonic()

    def progress(text: str) -> None:
        say(f"{time.monotonic() - started:6.0f} s  {text}")

    match study:
        case SpectralStudy():
            results = run_spectral(study, progress)
        case HybridStudy():
            results = run_hybrids(study, directory, progress)
        case GateStudy():
            results = run_gates(study, progress)
    write(results, directory)
    for name, caption in results.shown.items():
        say(f"\n{caption}\n{table_text(results.tables[name])}")
    seconds = time.monotonic() - started
    say(f"\n{study.name}: {seconds:.0f} s, results in {directory}/summary.html and results.json")
    return directory
