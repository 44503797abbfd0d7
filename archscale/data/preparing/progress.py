"""Lines that say how far a phase is: at most one every few seconds, and one at its end."""

import time
from collections.abc import Callable, Sequence

Say = Callable[[str], None]
INTERVAL = 5.0  # seconds between two lines


class Progress:
    """How much of a list of jobs is done.

    Args:
        verb: what happens to the data, such as "encoded".
        sizes: bytes of each job; None where they are unknown.
        say: receives the lines.
        clock: seconds, ever rising.
    """

    def __init__(
        self,
        verb: str,
        sizes: Sequence[int | None],
        say: Say,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.verb, self.sizes, self.say, self.clock = verb, sizes, say, clock
        known = [size for size in sizes if size is not None]
        self.total = sum(known) if len(known) == len(sizes) else None
        self._finished = 0
        self._under_way: dict[int, int] = {}  # job number: bytes
        self._start = self._last = clock()

    def add(self, job: int, size: int) -> None:
        """So many more bytes of job number `job` are done."""
        self._under_way[job] = self._under_way.get(job, 0) + size
        self.tick()

    def finish(self, job: int) -> None:
        """Job number `job` is done."""
        read = self._under_way.pop(job, 0)
        size = self.sizes[job]
        self._finished += read if size is None else size
        self.tick()

    def tick(self) -> None:
        """A line, if the last was long ago."""
        if self.clock() - self._last >= INTERVAL:
            self._last = self.clock()
            self.say(self._line())

    def end(self) -> None:
        """The last line."""
        seconds = self.clock() - self._start
        self.say(f"{self.verb} {_megabytes(self._done())} MB in {_duration(seconds)}")

    def _done(self) -> int:
        # A compressed file has more text than bytes: what is under way counts at most as its size.
        done = self._finished
        for job, read in self._under_way.items():
            size = self.sizes[job]
            done += read if size is None else min(read, size)
        return done

    def _line(self) -> str:
        done = self._done()
        rate = done / max(self.clock() - self._start, 1e-9)
        line = f"{self.verb} {_megabytes(done)}"
        if self.total is None:
            return f"{line} MB, {_megabytes(rate)} MB/s"
        left = f", {_duration((self.total - done) / rate)} left" if done else ""
        return f"{line} of {_megabytes(self.total)} MB, {_megabytes(rate)} MB/s{left}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def _duration(seconds: float) -> str:
    """Such as "12 s", "3 min 20 s", "4 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
