"""`archscale` that writes down which phase it is in, for tests that kill it: `start(…, module=
"tests.train.marked")` with the name of a file in `MARK`."""

from __future__ import annotations

import functools
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "ARCHSCALE_TEST_MARK"


def marking(doing: str, call: Callable) -> Callable:
    """The call, with `doing` in the file while it lasts and `step` after it."""

    @functools.wraps(call)
    def marked(*args: Any, **kwargs: Any) -> Any:
        mark(doing)
        try:
            return call(*args, **kwargs)
        finally:
            mark("step")

    return marked


def mark(doing: str) -> None:
    Path(os.environ[MARK]).write_text(doing)


def patch() -> None:
    from archscale.train import evaluate, trainer

    mark("start")
    evaluate.Evaluation.metrics = marking("evaluation", evaluate.Evaluation.metrics)  # type: ignore[method-assign]
    trainer.Run._save = marking("save", trainer.Run._save)  # type: ignore[method-assign]
    trainer.train_step = marking("step", trainer.train_step)


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        patch()
    runpy.run_module("archscale", run_name="__main__")
