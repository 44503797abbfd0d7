"""Tracking services beside metrics.jsonl: best effort, on a thread of their own, never in
training's way.

Lines wait in a bounded queue; when the service is slow or gone the oldest are dropped, with one
warning. Steps back are not: lines would stand twice. What metrics.jsonl holds is complete all the
same.
"""

from __future__ import annotations

import collections
import importlib.util
import netrc
import os
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from archscale.errors import ConfigError
from archscale.files import write_atomically

WAITING = 10_000  # lines at most
PATIENCE = 30.0  # seconds that the end of a run waits for what is left


class Tracker(Protocol):
    """A service that is connected. Its methods may block, and may raise."""

    def log(self, line: dict[str, Any]) -> None: ...

    def rewind(self, step: int) -> None:
        """What was logged of later steps counts no longer: the run has gone back."""

    def close(self) -> None: ...


Call: TypeAlias = tuple[str, Any] | None  # a method of a tracker, its argument; None: close


class BestEffort:
    """Runs a tracker on a thread.

    Args:
        name: of the service, for warnings.
        connect: called on the thread; may block and may raise.
        waiting: calls that wait at most; only lines are dropped for that.
        patience: seconds that `close` waits for what is left.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Tracker],
        waiting: int = WAITING,
        patience: float = PATIENCE,
    ):
        self.name, self._patience = name, patience
        self._calls: collections.deque[Call] = collections.deque()
        self._waiting, self._changed = waiting, threading.Condition()
        self._dropped = False
        self._thread = threading.Thread(target=self._run, args=(connect,), daemon=True, name=name)
        self._thread.start()

    def log(self, line: dict[str, Any]) -> None:
        """Returns at once."""
        self._put(("log", dict(line)))

    def rewind(self, step: int) -> None:
        """Returns at once."""
        self._put(("rewind", step))

    def close(self) -> None:
        """Give the service a while for what is left."""
        self._put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._warn(
                f"did not take everything within {self._patience:g} s; metrics.jsonl has it all"
            )

    def _put(self, call: Call) -> None:
        with self._changed:
            full = len(self._calls) >= self._waiting
            if full:
                lines = (i for i, each in enumerate(self._calls) if each and each[0] == "log")
                if (oldest := next(lines, None)) is not None:
                    del self._calls[oldest]
            self._calls.append(call)
            self._changed.notify()
        if full and not self._dropped:
            self._dropped = True
            self._warn("is too slow: old lines are dropped, metrics.jsonl has them all")

    def _next(self) -> Call:
        """Waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls)
            return self._calls.popleft()

    def _run(self, connect: Callable[[], Tracker]) -> None:
        try:
            tracker = connect()
            while (call := self._next()) is not None:
                method, argument = call
                getattr(tracker, method)(argument)
            tracker.close()
        except Exception as error:  # an outage of a service must not become one of training
            text = " ".join(str(error).split())[:200]
            self._warn(
                f"is not used any more ({type(error).__name__}: {text}); metrics.jsonl has"
                " everything"
            )
            while self._next() is not None:  # so that nothing piles up
                pass

    def _warn(self, text: str) -> None:
        print(f"archscale: warning: {self.name} {text}", file=sys.stderr, flush=True)


def check_wandb(mode: str) -> None:
    """Check that W&B is there where it is wanted.

    Raises:
        ConfigError: it is not installed.
    """
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "wandb is not installed",
            "telemetry.wandb.mode",
            "pip install wandb, or set it to disabled",
        )


def wandb_tracker(
    mode: str, project: str, name: str, config: dict[str, Any], run_dir: Path
) -> BestEffort | None:
    """Weights & Biases, or None when disabled. A resumed run goes on under its own id, kept in
    `run_dir`.

    Args:
        mode: auto (online where a key is configured, otherwise offline), online, offline or
            disabled. What is offline lies in `run_dir`/wandb for `wandb sync`.
    """
    if mode == "disabled":
        return None
    import wandb

    mode = ("online" if has_wandb_key() else "offline") if mode == "auto" else mode
    identity = run_dir / "wandb_id"
    if not identity.exists():
        write_atomically(identity, uuid.uuid4().hex[:12])
    options: dict[str, Any] = {
        "project": project,
        "name": name,
        "id": identity.read_text().strip(),
        "resume": "allow",
        "mode": mode,
        "config": config,
        "tags": tags(config),
        "dir": str(run_dir),
    }

    class Run:
        def __init__(self) -> None:
            self._run = wandb.init(**options, settings=wandb.Settings(silent=True, init_timeout=20))
            # Not W&B's own step, which cannot go back when the guard does.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

        def log(self, line: dict[str, Any]) -> None:
            self._run.log({key: value for key, value in line.items() if value is not None})

        def rewind(self, step: int) -> None:
            """Lines of a step that comes again stand beside the first ones: W&B deletes none."""

        def close(self) -> None:
            self._run.finish()

    return BestEffort("wandb", Run)


def has_wandb_key() -> bool:
    """Whether a key is in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tags(config: dict[str, Any]) -> list[str]:
    """Rule, parameterization, size and experts of a resolved config."""
    model, moe = config["model"], config["model"]["moe"]
    return [
        config["optimizer"]["matrix"]["rule"],
        config["parameterization"]["kind"],
        f"d{model['depth']}w{model['width']}",
        f"moe{moe['sparsity']}x{moe['top_k']}" if moe else "dense",
    ]
