"""Signals that end a run: SIGTERM, SIGUSR1 and Ctrl-C (SIGINT).

Before the first step is trained there is nothing to save, and the process ends at once. After that
`Signals.asked` says which signal came, the ranks agree on a step, save, and end together. A thread
reads the signals, so that they are heard also while the main thread waits in a library for a rank
that is gone: such a process ends after a grace.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from archscale.checkpoint.place import Place, StorePath
from archscale.errors import INTERRUPTED, RETRY
from archscale.files import checkpoint_steps

STATUS = {signal.SIGTERM: RETRY, signal.SIGUSR1: RETRY, signal.SIGINT: INTERRUPTED}
GRACE = "ARCHSCALE_GRACE"  # environment variable: seconds from a signal to the end of a step
STATUS_FILE = "ARCHSCALE_STATUS_FILE"  # environment variable: file that gets the exit status
USUAL_GRACE = 25.0  # schedulers kill 30 s after SIGTERM
AGAIN = 1.0  # seconds between two Ctrl-C of which the second means something of its own
AGENTS_OWN = 0.2  # seconds in which all ranks get a signal that torchrun is passing on
FORWARDING = 2.0  # seconds that torchrun may take to pass on a signal


class Stopped(SystemExit):
    """The run was ended by a signal, on all ranks together, and has said so.

    Attributes:
        status: exit status of the process.
    """

    def __init__(self, number: int):
        self.status = STATUS[signal.Signals(number)]
        super().__init__(self.status)


class Signals:
    """The signals that this process has got.

    Attributes:
        asked: number of the first signal; 0: none.
        from_agent: torchrun itself has sent one: it ends its processes because it was told to, one
            of them has failed, or a node joins, and need not be told.
        checkpoints: where those of the run lie, once it is known.
        releases: called before a process ends at once.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.from_agent = self._over = False
        self.checkpoints: Place | None = None
        self.releases: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._since = 0.0  # when the first signal came
        self._deadline: float | None = None  # of the grace, on the monotonic clock
        self._untrained = True  # nothing was trained that is not saved
        self._unhurried = 0  # depth of what may take longer than the grace
        self._pipe = (-1, -1)

    # --- the main thread

    def begin(self) -> None:
        """A run begins; one before it may have finished in this process."""
        if threading.current_thread() is threading.main_thread():
            with self._lock:
                self._untrained, self._unhurried = True, 0

    def trained(self) -> None:
        """There is from now on something to save."""
        if self._untrained:
            with self._lock:
                self._untrained = False

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """What takes its time and leads to the end, such as saving: the grace does not count."""
        with self._lock:
            self._unhurried += 1
        try:
            yield
        finally:
            with self._lock:
                self._unhurried -= 1
                if self._deadline is not None:
                    self._deadline = time.monotonic() + grace()

    def finished(self) -> None:
        """Everything is saved: what is left may finish."""
        with self._lock:
            self._untrained = False
            self._unhurried += 1

    def end(self, text: str) -> NoReturn:
        """End the process at once, with `text` and where the same command starts from."""
        with self._lock:
            self._end(self.asked, text)

    # --- the threads

    def _listen(self, numbers: list[signal.Signals]) -> None:
        """Take the signals, which other threads block, to learn who has sent them."""
        while not self._over:
            taken = signal.sigwaitinfo(numbers)
            if not self._over:
                self.from_agent |= taken.si_pid == elastic_agent()
                os.write(self._pipe[1], bytes([taken.si_signo]))

    def _watch(self) -> None:
        while True:
            left = None if self._deadline is None else max(0.1, self._deadline - time.monotonic())
            ready, _, _ = select.select([self._pipe[0]], [], [], left)
            numbers = os.read(self._pipe[0], 64) if ready else b""
            if 0 in numbers:  # the run is over
                return
            with self._lock:
                # Of signals that come at once the kernel lets the last one be handled first.
                for number in sorted(numbers):
                    if number in STATUS:
                        self._receive(number)
                late = self._deadline is not None and time.monotonic() >= self._deadline
                if late and not self._unhurried:
                    self._end(
                        self.asked,
                        f"stopped by {self._name()} without saving, {grace():g} s ({GRACE})"
                        f" after it still in {_place()}",
                    )

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self.asked:
            if number == signal.SIGINT and now - self._since > AGAIN:
                self._end(number, "stopped by a second Ctrl-C without saving")
            return
        self.asked, self._since = number, now
        if self._untrained:
            self._end(number, f"stopped by {self._name()} with nothing to save")
        self._deadline = now + grace()

    def _name(self) -> str:
        return name(self.asked) + (" from torchrun" if self.from_agent else "")

    def _end(self, number: int, text: str) -> NoReturn:
        status = STATUS[signal.Signals(number)]
        agent = elastic_agent()
        if agent is None or os.environ.get("RANK", "0") == "0":
            # Not through sys.stderr, whose lock the main thread may hold.
            line = f"archscale: {text}: {self.newest()}\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode("ascii", "backslashreplace"))
        # Torchrun's own signal may come of a crash, whose status is another. Where it does not, at
        # least the first of these processes that ends sees all others run.
        if not self.from_agent or (agent is not None and all_run(agent)):
            leave_status(status)
        if agent is not None and not self.from_agent:
            # One rank is enough: another signal means that torchrun has been told.
            patience = AGENTS_OWN * (1 + int(os.environ.get("LOCAL_RANK", "0")))
            told = select.select([self._pipe[0]], [], [], patience)[0] or tell(agent)
            # The others hear of it before they miss this process.
            if told and select.select([self._pipe[0]], [], [], FORWARDING)[0]:
                time.sleep(0.1)
        for release in self.releases:
            with contextlib.suppress(Exception):
                release()
        os._exit(status)

    def newest(self) -> str:
        """What the same command will start from."""
        step = 0
        with contextlib.suppress(OSError):
            if isinstance(self.checkpoints, StorePath):  # which may not answer
                return f"the same command goes on from the newest checkpoint in {self.checkpoints}"
            if self.checkpoints is not None:
                step = max(checkpoint_steps(self.checkpoints), default=0)
        if not step:
            return "there is no checkpoint yet; the same command starts again"
        return f"the newest checkpoint is that of step {step}; the same command goes on from it"

    # --- start and end

    def _start(self) -> Callable[[], None]:
        """Listen; returns what undoes it."""
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        # Shells let what runs in the background ignore Ctrl-C.
        numbers = [number for number in STATUS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, _leave_it_to_the_thread) for number in numbers}
        # For threads that were there before, and do not block the signals.
        descriptor = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        thread = threading.Thread(target=self._watch, daemon=True, name="signals")
        listener = threading.Thread(
            target=self._listen, args=(numbers,), daemon=True, name="senders"
        )
        thread.start()
        if numbers:
            listener.start()

        def undo() -> None:
            self._over = True
            if listener.ident is not None:
                signal.pthread_kill(listener.ident, numbers[0])  # it waits for one
                listener.join()
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.write(self._pipe[1], b"\0")
            thread.join()
            for end in self._pipe:
                os.close(end)

        return undo


_current = Signals()


def current() -> Signals:
    """Those of the innermost `listening`; outside of one there never are any."""
    return _current


@contextlib.contextmanager
def listening() -> Iterator[Signals]:
    """Hear signals until the end of the block; inside another such block, that one's. In another
    thread than the main one, which gets no signals, none are heard."""
    global _current
    main = threading.current_thread() is threading.main_thread()
    if _current._pipe != (-1, -1) or not main:
        yield _current
        return
    _current = Signals()
    undo = _current._start()
    try:
        yield _current
    finally:
        undo()
        _current = Signals()


def _leave_it_to_the_thread(number: int, frame: Any) -> None:
    """A handler of Python's must be there, or the number is not written to the pipe."""


def _forget_in_child() -> None:
    """A forked process has the parent's pipe: its signals are not the parent's."""
    global _current
    if _current._pipe != (-1, -1):
        signal.set_wakeup_fd(-1)
        for number in STATUS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STATUS)
        _current = Signals()


os.register_at_fork(after_in_child=_forget_in_child)


def grace() -> float:
    """Seconds from a signal to the end of a step, after which a process is taken for stuck."""
    text = os.environ.get(GRACE, "").strip()
    return float(text) if text.isdigit() else USUAL_GRACE


def leave_status(status: int) -> None:
    """Tell a script around torchrun, which replaces exit statuses by its own."""
    if path := os.environ.get(STATUS_FILE):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{status}\n")


def forget_status() -> None:
    """Empty what an earlier start under the same torchrun has left: this one may end otherwise."""
    if (path := os.environ.get(STATUS_FILE)) and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.truncate(path, 0)


def elastic_agent() -> int | None:
    """Process id of the torchrun that has started this process, directly or through others; None
    without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        # What torchrun starts has the variable, itself it has not.
        while pid > 1 and b"\0TORCHELASTIC_RUN_ID=" in b"\0" + _of(pid, "environ"):
            pid = int(_of(pid, "stat").rpartition(b")")[2].split()[1])
        # Process 1 is torchrun in a container, and otherwise who adopts orphans.
        if pid > 1 or re.search(rb"torchrun|torch\.distributed|accelerate", _of(pid, "cmdline")):
            return pid
    return None


def all_run(agent: int) -> bool:
    """Whether all processes that torchrun has started on this machine still run."""
    running = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # After the command's name, which may hold anything: state and parent.
            state, parent = _of(int(entry.name), "stat").rpartition(b")")[2].split()[:2]
            running += int(parent) == agent and state != b"Z"
    return running >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def tell(agent: int) -> bool:
    """End torchrun, where a process that ends by itself would be started again in vain; whether it
    was told. One that takes a range of nodes goes on with those that stay: it sends SIGTERM itself
    when one of them leaves or joins."""
    if takes_any_nodes(agent):
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(agent, signal.SIGTERM)
    return True


def takes_any_nodes(agent: int) -> bool:
    """Whether this torchrun was started with a range of nodes, such as `--nnodes=1:4`."""
    words: list[str] = []
    with contextlib.suppress(OSError):
        variables = _of(agent, "environ").decode(errors="replace").split("\0")
        words = [word.removeprefix("PET_") for word in variables if word.startswith("PET_NNODES=")]
        words += _of(agent, "cmdline").decode(errors="replace").split("\0")
    # The last one counts, and the command line before the environment.
    values = re.findall(r"(?m)^(?:--)?nnodes[=\n]([\d:]+)$", "\n".join(words), re.IGNORECASE)
    least, _, most = (values or ["1"])[-1].partition(":")
    return bool(most) and least != most


def _of(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


def name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _place() -> str:
    """Where the main thread is: its innermost function of archscale."""
    main = threading.main_thread().ident
    innermost = None if main is None else sys._current_frames().get(main)
    frame = innermost
    while frame is not None and "archscale" not in Path(frame.f_code.co_filename).parts:
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "no function"
    code = frame.f_code
    return f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})"
