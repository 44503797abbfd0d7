"""Jobs at the same time: isolated, tried again when they crash, gone when their sweep is."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from archscale.sweep.launchers.choice import train_one
from archscale.sweep.launchers.local import Job, next_attempt, run_local, why
from archscale.sweep.run import _terminable

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Code(Job):
    """A job that runs Python instead of archscale."""

    def command(self) -> list[str]:
        return [sys.executable, "-c", *self.arguments]


def run(folder, codes, slots=2, retries=2):
    events = []
    jobs = [Code(name, [code], folder / "logs" / f"{name}.log") for name, code in codes.items()]
    failed = run_local(
        jobs, [{"SLOT": str(i)} for i in range(slots)], retries, events.append, lambda: None
    )
    return failed, [(e.what, e.job.name, e.attempt) for e in events], events


def test_a_crash_is_tried_again_a_refusal_is_not_and_others_go_on(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    twice = (
        f"import os, pathlib; p = pathlib.Path({str(tmp_path)!r}, 'n'); n = len(p.read_text()) if"
        " p.exists() else 0; p.write_text('x' * (n + 1)); os.kill(os.getpid(), 9) if n < 2 else"
        " None"
    )
    refused = (
        "import sys; print('archscale: warning: old', file=sys.stderr); print('archscale: no (a):"
        " b', file=sys.stderr); sys.exit(2)"
    )
    failed, told, events = run(
        tmp_path,
        {"twice": twice, "refused": refused, "crash": "print('last words'); 1 / 0", "good": "pass"},
    )
    assert failed == {
        "refused": "no (a): b",
        "crash": "exit status 1: ZeroDivisionError: division by zero",
    }
    assert [t for t in told if t[1] == "twice"] == [
        (what, "twice", i)
        for i in (1, 2, 3)
        for what in ("started", "finished" if i == 3 else "failed")
    ]
    assert [t for t in told if t[1] == "refused"] == [
        ("started", "refused", 1),
        ("failed", "refused", 1),
    ]
    assert max(t[2] for t in told if t[1] == "crash") == 3  # two retries, then an end
    assert ("finished", "good", 1) in told
    assert (
        next(e.reason for e in events if e.job.name == "twice" and e.what == "failed")
        == "ended by SIGKILL"
    )
    assert (tmp_path / "logs" / "crash.log").read_text().count("last words") == 3


def test_as_many_at_once_as_slots_each_in_its_own(tmp_path):
    """Jobs that meet write who they saw."""
    code = (
        f"import os, time, pathlib; p = pathlib.Path({str(tmp_path)!r}, 'in');"
        " p.mkdir(exist_ok=True); me = p / os.environ['SLOT'];me.touch(exist_ok=False);"
        " print(len(list(p.iterdir()))); time.sleep(0.3); me.unlink()"
    )
    failed, told, _ = run(tmp_path, {f"job{i}": code for i in range(5)}, slots=2)
    assert not failed
    seen = [int((tmp_path / "logs" / f"job{i}.log").read_text()) for i in range(5)]
    assert max(seen) == 2
    running = most = 0
    for what, *_ in told:
        running += 1 if what == "started" else -1
        most = max(most, running)
    assert most == 2


def test_an_interruption_ends_all_jobs(tmp_path):
    def tick():
        if all(
            (tmp_path / f"{name}.log").exists() and (tmp_path / f"{name}.log").read_text()
            for name in "ab"
        ):
            raise KeyboardInterrupt

    jobs = [
        Code(
            name,
            ["import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
            tmp_path / f"{name}.log",
        )
        for name in "ab"
    ]
    with pytest.raises(KeyboardInterrupt):
        run_local(jobs, [{}, {}], 2, lambda event: None, tick)
    for name in "ab":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{name}.log").read_text()), 0)


def test_a_run_that_a_signal_has_stopped_goes_on_without_a_try_used_up(tmp_path):
    count = tmp_path / "count"
    code = (
        f"import pathlib, sys; p = pathlib.Path({str(count)!r});"
        " n = p.exists() and int(p.read_text());"
        " p.write_text(str(n + 1)); n < 3 and (print('archscale: stopped by SIGTERM at step 3:"
        " checkpoint x; the same command goes on', file=sys.stderr), sys.exit(75))"
    )
    job, events = Code("stopped", [code] * 9, tmp_path / "log"), []
    assert run_local([job], [{}], 0, events.append, lambda: None) == {}
    assert [event.what for event in events] == ["started", "failed"] * 3 + ["started", "finished"]
    assert {event.attempt for event in events} == {1}


def test_a_run_that_a_signal_stops_before_it_saves_is_not_started_for_ever(tmp_path):
    """As when torchrun stops the others because a rank crashes at start."""
    code = (
        "import sys; print('archscale: stopped by SIGTERM with nothing to save: there is no"
        " checkpoint yet; the same command starts again', file=sys.stderr); sys.exit(1)"
    )
    failed, told, _ = run(tmp_path, {"stopped": code}, retries=1)
    assert failed["stopped"].startswith("stopped by SIGTERM with nothing to save")
    assert told == [(what, "stopped", i) for i in (1, 2) for what in ("started", "failed")]


AT_A_STEP = (
    "stopped by SIGTERM at step 3: checkpoint run/checkpoints/step_3; the same command goes on"
)
AT_START = "stopped by SIGTERM with nothing to save: there is no checkpoint yet"
STUCK = "stopped by Ctrl-C without saving, 25 s (ARCHSCALE_GRACE) after it still in f (a.py:1)"
REFUSED = "no key a (a): remove it"
LOST = "rank 0 of 2 cannot reach another rank, which has ended or is cut off: reset"
HANGS = "rank 0 made no progress for 9 s (telemetry.stuck_after): its stacks are in x"


@pytest.mark.parametrize(
    ("lines", "reason", "refused", "attempt"),
    [
        ([AT_A_STEP], AT_A_STEP, False, 1),
        ([AT_START], AT_START, False, 2),
        ([STUCK], STUCK, False, 2),
        ([REFUSED, AT_START], REFUSED, True, 2),
        ([AT_START, REFUSED], REFUSED, True, 2),
        ([LOST, AT_START], LOST, False, 2),  # a rank that the kernel has killed, not a refusal
        ([HANGS, AT_A_STEP], HANGS, False, 2),
    ],
)
def test_what_a_run_that_was_stopped_counts_for(tmp_path, lines, reason, refused, attempt):
    log = tmp_path / "log"
    log.write_text("".join(f"archscale: {line}\n" for line in [*lines, "warning: late"]))
    assert why(log, 0, 1) == (reason, refused)
    assert next_attempt(1, reason) == attempt


def test_what_a_run_says_while_it_is_ended_is_in_its_log(tmp_path, capfdbinary):
    """Also more of it than a pipe holds."""
    code = (
        "import os, signal, sys, time\n"
        "def end(*_):\n"
        "    print('x' * 300_000, 'archscale: stopped by SIGTERM', flush=True)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(60)"
    )
    job = Code("a", [code], tmp_path / "log")
    with pytest.raises(KeyboardInterrupt), _terminable():
        train_one(job, cpu=True)
    assert job.log.read_text().endswith("archscale: stopped by SIGTERM\n")
    assert capfdbinary.readouterr().out == job.log.read_bytes()


def test_the_reason_is_that_of_the_last_attempt(tmp_path):
    log = tmp_path / "log"
    log.write_text("archscale: old (a): b\n")
    offset = log.stat().st_size
    with log.open("a") as stream:
        stream.write("step 1\n")
    assert why(log, offset, 1) == ("exit status 1: step 1", False)
    assert why(log, 0, 2) == ("old (a): b", True)
    log.write_text(
        "archscale: rank 0 made no progress for 9 s (telemetry.stuck_after): its stacks are in x\n"
    )
    assert why(log, 0, 3)[1] is False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's PR_SET_PDEATHSIG")
def test_a_child_dies_with_its_parent_and_a_second_one_waits_for_it(tmp_path):
    """kill -9 of the sweep, which has no chance to end anything."""
    work = tmp_path / "work.py"
    work.write_text(
        "import os, sys, time\nopen(sys.argv[1],"
        " 'w').write(str(os.getpid()))\ntime.sleep(float(sys.argv[2]))\n"
    )
    lock, env = str(tmp_path / "lock"), {**os.environ, "PYTHONPATH": str(ROOT)}
    child = [sys.executable, "-m", "archscale.sweep.launchers.child", lock]
    start = (
        f"import os, subprocess; subprocess.Popen({child!r} + [str(os.getpid()), {str(work)!r},"
        f" {str(tmp_path / 'first')!r}, '60']).wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", start], env=env)
    eventually(lambda: (tmp_path / "first").exists() and (tmp_path / "first").read_text())
    first = int((tmp_path / "first").read_text())
    second = subprocess.Popen([*child, "0", str(work), str(tmp_path / "second"), "0"], env=env)
    try:
        time.sleep(0.5)
        assert second.poll() is None
        assert not (tmp_path / "second").exists()
        parent.send_signal(signal.SIGKILL)
        eventually(lambda: not alive(first))
        assert second.wait(20) == 0
        assert (tmp_path / "second").exists()
    finally:
        for process in (parent, second):
            process.kill()
            process.wait()


def test_a_child_of_nobody_does_not_start(tmp_path):
    command = [
        sys.executable,
        "-m",
        "archscale.sweep.launchers.child",
        "-",
        "1",
        "-c",
        "print('ran')",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "")
