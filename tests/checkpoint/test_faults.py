"""Storage that fails, and processes that die on it: an old checkpoint stays whole until a new one
is, whoever is left says why, and the same command goes on with the same curve."""

from __future__ import annotations

import errno
import functools
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from archscale.config import Config
from archscale.files import OWNER, checkpoint_steps, step_directory
from archscale.train import watchdog
from archscale.train.watchdog import Watchdog
from tests.faults import FAILURES, Act, Storage, fail, full, hang, kill, slow
from tests.forks import fork
from tests.train.faulty import (
    SAVING,
    contents,
    files,
    last_contents,
    lines,
    remains,
    train,
)
from tests.train.tiny import config, run, tiny_data

KINDS = ("*.distcp", ".metadata", "rng_*", "state.json")  # of the files of a checkpoint
ENDED = 100.0  # seconds within which a command has ended, however busy the machine is


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


def made(data: str, asynchronous: bool = False, keep: int = 1, **sections) -> Config:
    """4 steps with checkpoints of steps 2 and 4."""
    checkpoint = {"every": 2, "keep": keep, "async": asynchronous}
    telemetry = {"every": 1, **sections.pop("telemetry", {})}
    return config(data, steps=4, checkpoint=checkpoint, telemetry=telemetry, **sections)


@pytest.fixture(scope="module", params=SAVING)
def asynchronous(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def straight(data, asynchronous, tmp_path_factory) -> Path:
    """A run that nobody touched."""
    run_dir = tmp_path_factory.mktemp("straight") / "r"
    done = train(made(data, asynchronous), run_dir)[0].wait(ENDED)
    assert done.status == 0, done
    return run_dir


@pytest.fixture(scope="module")
def half(data, asynchronous, tmp_path_factory) -> Path:
    """The same, killed after its first checkpoint."""
    run_dir = tmp_path_factory.mktemp("half") / "r"
    act = functools.partial(kill, at=2, after="step_00000002")
    done = train(made(data, asynchronous), run_dir, act)[0].wait(ENDED)
    assert done.status == -signal.SIGKILL, done
    assert checkpoint_steps(run_dir / "checkpoints") == [2]
    return run_dir


def old_one(run_dir: Path) -> dict[str, bytes]:
    """The files of its checkpoint of step 2."""
    return files(step_directory(run_dir / "checkpoints", 2))


def assert_no_checkpoint_is_lost(run_dir: Path, half: Path, straight: Path) -> None:
    """The old one as it was or the new one whole, and nothing else that counts as one."""
    checkpoints = run_dir / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    assert steps
    assert set(steps) <= {2, 4}
    if 2 in steps:
        assert old_one(run_dir) == old_one(half)
    if 4 in steps:
        assert contents(step_directory(checkpoints, 4)) == last_contents(straight)


def assert_goes_on(run_dir: Path, config: Config, straight: Path, processes: int = 1) -> None:
    """The same command once more gives the run that nobody touched, and leaves nothing else."""
    for child in train(config, run_dir, processes=processes):
        done = child.wait(ENDED)
        assert done.status == 0, done
        assert "damaged" not in done.err
    assert lines(run_dir) == lines(straight)
    assert last_contents(run_dir) == last_contents(straight)
    assert remains(run_dir) == []


# --- a process that is killed


@pytest.fixture(scope="module")
def points(data, asynchronous, half, tmp_path_factory) -> list[int]:
    """Numbers of the changes that the second half of the run makes in its directory, but for most
    of the writes within one file, which leave the same behind."""
    folder = tmp_path_factory.mktemp("counted")
    shutil.copytree(half, folder / "r")
    log = folder / "log.json"
    done = train(made(data, asynchronous), folder / "r", log=str(log))[0].wait(ENDED)
    assert done.status == 0, done
    changes = json.loads(log.read_text())
    within = [
        number
        for (_, *before), (number, *now), (_, *after) in zip(changes, changes[1:], changes[2:])
        if before == now == after
    ]
    kept = {number for number, *_ in changes} - set(within)
    return sorted(kept | set(within[:: max(1, len(within) // 4)]))


ALL = [pytest.mark.slow, pytest.mark.timeout(7200)]  # two commands for each point


@pytest.mark.parametrize(
    "share", [pytest.param(6, id="some"), pytest.param(None, id="all", marks=ALL)]
)
def test_killed_at_every_point(data, asynchronous, half, straight, points, tmp_path, share):
    """SIGKILL in place of each change that starting, training, saving and pruning make."""
    chosen = points if share is None else random.Random(19).sample(points, share)
    for at in chosen:
        run_dir = shutil.copytree(half, tmp_path / f"r{at}")
        act = functools.partial(kill, at=at, torn=at % 2 == 0)
        done = train(made(data, asynchronous), run_dir, act)[0].wait(ENDED)
        assert done.status == -signal.SIGKILL or (asynchronous and done.status == 0), (at, done)
        assert_no_checkpoint_is_lost(run_dir, half, straight)
        assert_goes_on(run_dir, made(data, asynchronous), straight)
        shutil.rmtree(run_dir)
    print(f"killed at {len(chosen)} of {len(points)} points")


@pytest.mark.parametrize("dies", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_dies_while_saving(data, asynchronous, tmp_path, dies):
    """The other one names the cause, and ends."""
    config = made(data, asynchronous)
    run_dir = tmp_path / "r"
    for child in train(config, tmp_path / "straight", processes=2):
        assert child.wait(ENDED).status == 0
    act = functools.partial(dies_while_saving, "step_00000004")
    ended = [child.wait(ENDED) for child in train(config, run_dir, act, processes=2, on_rank=dies)]
    assert ended[dies].status == -signal.SIGKILL
    left = ended[1 - dies]
    assert left.status == 1, left
    assert len(left.err.splitlines()) == 1, left.err
    assert "cannot reach another rank" in left.err
    assert 2 in checkpoint_steps(run_dir / "checkpoints")
    assert_goes_on(run_dir, config, tmp_path / "straight", processes=2)


def dies_while_saving(name: str) -> Act:
    def act(change):
        if change.kind == "write" and name in str(change.path):
            kill(at=1)(change)

    return act


# --- files that are damaged


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_passes_over(data: str, folder: Path, capfd, harm) -> None:
    """There are five checkpoints, the four newest each with another kind of file harmed: the
    oldest is used."""
    run_dir = folder / "r"
    config5 = config(data, steps=5, checkpoint={"every": 1, "keep": 9}, telemetry={"every": 1})
    run(config5, str(run_dir))
    expected = lines(run_dir), last_contents(run_dir)
    for step, kind in zip((5, 4, 3, 2), KINDS):
        harm(next(step_directory(run_dir / "checkpoints", step).glob(kind)))
    capfd.readouterr()
    run(config5, str(run_dir))
    warnings = capfd.readouterr().err
    for step, kind in zip((5, 4, 3, 2), KINDS):
        name = kind.strip("*")
        assert any(f"step_{step:08d}" in line and name in line for line in warnings.splitlines())
    assert (lines(run_dir), last_contents(run_dir)) == expected


def test_files_cut_short_are_named_and_an_older_checkpoint_used(data, tmp_path, capfd):
    assert_passes_over(data, tmp_path, capfd, truncate)


def test_flipped_bits_are_found_and_an_older_checkpoint_used(data, tmp_path, capfd):
    assert_passes_over(data, tmp_path, capfd, flip)


def test_nothing_of_a_damaged_checkpoint_is_left_in_a_run_that_starts_anew(data, tmp_path, capfd):
    """Tensors are in their place by the time that the checksum of their file is known."""
    sections = {"checkpoint": {"every": 1}, "telemetry": {"every": 1}, "training": {"ema": 0.9}}
    config2 = config(data, steps=2, **sections)
    run(config2, str(tmp_path))
    expected = lines(tmp_path), last_contents(tmp_path)
    for step in (1, 2):
        flip(next(step_directory(tmp_path / "checkpoints", step).glob("*.distcp")))
    run(config2, str(tmp_path))
    assert capfd.readouterr().err.count("has the checksum") == 2
    assert (lines(tmp_path), last_contents(tmp_path)) == expected


# --- storage that fails


def run_on(config: Config, run_dir: str, act: Act | None, on_rank: int) -> None:
    """Train in this process; on one rank, the storage acts."""
    from archscale.distributed import rank

    with Storage(run_dir, act if rank() == on_rank else None):
        run(config, run_dir)


def fails_saving(config: Config, run_dir: str, name: str, number: int, on_rank: int) -> None:
    run_on(config, run_dir, fail(number, name=name), on_rank)


def runs_full(config: Config, run_dir: str, after: int, on_rank: int) -> None:
    run_on(config, run_dir, full(after), on_rank)


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_save_that_fails_on_one_rank_ends_all_with_its_cause(
    pool, data, asynchronous, tmp_path, on_rank
):
    """The old checkpoint stays as it is, and once there is space the same command goes on."""
    straight = tmp_path / "straight"
    pool(2).run(run, made(data, asynchronous), str(straight), timeout=ENDED)
    for name, number in FAILURES.items():
        run_dir = tmp_path / name
        ended = pool(2).run(
            fails_saving,
            made(data, asynchronous),
            str(run_dir),
            "step_00000004",
            number,
            on_rank,
            expect_error=True,
            timeout=ENDED,
        )
        for kind, message in ended:
            assert kind == "CheckpointError", message
            assert FAILED[number] in message
            assert "\n" not in message
        before = old_one(run_dir)
        assert checkpoint_steps(run_dir / "checkpoints") == [2]
        assert len(lines(run_dir)) == 4
        pool(2).run(run, made(data, asynchronous), str(run_dir), timeout=ENDED)
        assert before
        assert lines(run_dir) == lines(straight)
        assert last_contents(run_dir) == last_contents(straight)
        assert remains(run_dir) == []


FAILED = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EROFS: "Read-only file system",
    errno.EIO: "Input/output error",
    errno.ESTALE: "Stale file handle",
}


def test_a_disk_that_fills_up_ends_all_ranks_of_the_command_with_one_line(
    data, asynchronous, tmp_path
):
    config, run_dir = made(data, asynchronous), tmp_path / "r"
    act = functools.partial(fail, errno.ENOSPC, name="step_00000004")
    ended = [child.wait(ENDED) for child in train(config, run_dir, act, processes=2, on_rank=1)]
    assert [done.status for done in ended] == [2, 2]
    (line,) = "".join(done.err for done in ended).splitlines()
    assert line.startswith("archscale: cannot write a checkpoint: No space left on device (")
    assert checkpoint_steps(run_dir / "checkpoints") == [2]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("owner.json", []),
        ("config.yaml", []),
        ("plan.json", ["config.yaml"]),
        ("metrics.jsonl", None),
    ],
)
@pytest.mark.parametrize(
    ("failure", "at"),  # from opening it on, or from the first write on
    [("EROFS", 1), ("ENOSPC", 2), *(pytest.param(f, 2, marks=pytest.mark.slow) for f in FAILURES)],
)
def test_a_file_of_the_run_directory_that_cannot_be_written(
    data, tmp_path, name, left, failure, at
):
    """One line that names it, and no half of it."""
    run_dir = tmp_path / "r"
    act = functools.partial(fail, FAILURES[failure], at=at, name=name)
    done = train(made(data), run_dir, act)[0].wait(ENDED)
    assert done.status == 2, done
    (line,) = done.err.splitlines()
    assert FAILED[FAILURES[failure]] in line
    assert f"({run_dir if name == OWNER else run_dir / name})" in line
    if left is not None:
        there = sorted(files(run_dir))
        if failure not in ("ENOSPC", "EDQUOT"):  # nothing can be deleted there
            there = [path for path in there if not path.endswith(".tmp")]
        assert there == left
    assert_goes_on_from_anywhere(made(data), run_dir)
    assert remains(run_dir) == []


def assert_goes_on_from_anywhere(config: Config, run_dir: Path) -> None:
    done = train(config, run_dir)[0].wait(ENDED)
    assert done.status == 0, done
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 3, 4]


# --- storage that is slow


def test_storage_that_hangs_ends_at_the_time_of_the_watchdog(data, asynchronous, tmp_path):
    config = made(data, asynchronous, telemetry={"stuck_after": 3})
    act = functools.partial(hang, "step_00000004")
    done = train(config, tmp_path / "r", act)[0].wait(ENDED)
    assert done.status == 3, done
    (line,) = done.err.splitlines()
    assert "rank 0 made no progress for" in line
    assert "(telemetry.stuck_after): its stacks are in" in line
    stacks = (tmp_path / "r" / "stacks_rank_0.txt").read_text()
    assert "in hang.<locals>.act" in stacks
    assert_goes_on_from_anywhere(config, tmp_path / "r")


def test_a_watchdog_does_not_wait_for_storage_that_hangs(tmp_path):
    """Neither to see whether a checkpoint grows, nor to write its stacks."""
    done = fork(watched_by_one_that_cannot_write, str(tmp_path), folder=tmp_path).wait(ENDED)
    assert done.status == 3, done
    assert "its stacks cannot be written to" in done.err


def watched_by_one_that_cannot_write(folder: str) -> None:
    watchdog.GRACE = 2.0
    dog = Watchdog(Path(folder), 1.0)
    Path.rglob = Hung.write = lambda *args: time.sleep(3600)
    dog._file = Hung()
    time.sleep(3600)


class Hung:
    """A file on storage that hangs."""


def test_storage_that_is_slow_is_not_taken_for_one_that_hangs(data, asynchronous, tmp_path):
    """A save that takes longer than `telemetry.stuck_after`, but goes on."""
    config = made(data, asynchronous, telemetry={"stuck_after": 2})
    act = functools.partial(slow, 0.05)
    done = train(config, tmp_path / "r", act)[0].wait(ENDED)
    assert done.status == 0, done
    assert len(lines(tmp_path / "r")) == 4
