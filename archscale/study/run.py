"""From a study's file to its directory of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from archscale.config.layers import write_yaml
from archscale.study.config import HybridStudy, SpectralStudy, load_study
from archscale.study.gates import run_gates
from archscale.study.hybrids import run_hybrids
from archscale.study.output import prepare, table_text, write
from archscale.study.spectral import run_spectral


def run_study(
    path: Path, overrides: Sequence[str], out: Path | None, say: Callable[[str], None]
) -> Path:
    """Run the study of a file; returns the directory that the results are in, by default
    runs/<name>.

    Raises:
        ArchscaleError: anything the user can mend.
    """
    study = load_study(path, overrides)
    directory = out or Path("runs") / study.name
    prepare(directory)
    write_yaml(study.model_dump(mode="json", by_alias=True), directory / "study.yaml")
    started = time.monotonic()

    def tell(text: str) -> None:
        say(f"{time.monotonic() - started:6.0f} s  {text}")

    if isinstance(study, SpectralStudy):
        results = run_spectral(study, tell)
    elif isinstance(study, HybridStudy):
        results = run_hybrids(study, directory, tell)
    else:
        results = run_gates(study, tell)
    write(results, directory)
    for name, caption in results.shown.items():
        say(f"\n{caption}\n{table_text(results.tables[name])}")
    say(
        f"\n{study.name}: {time.monotonic() - started:.0f} s, results in {directory}/summary.html"
        " and results.json"
    )
    return directory
