"""Which files a pattern matches, whatever stands in the folder; and whether they have changed."""

import errno
import hashlib
import os
from glob import glob
from pathlib import Path

import pytest
from pydantic import ValidationError

from archscale.data.preparing.sources import PythonStdlibSource, hash_file
from archscale.data.preparing.sources.globbing import match, match_files
from archscale.data.preparing.trouble import Trouble
from archscale.errors import DataError
from tests.data.preparing.sources import jsonl, read, text


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _names(pattern: str) -> list[str]:
    return [name for name, _ in match_files(pattern, "*.txt")]


def _make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name.encode("utf-8", "replace").decode())


PATTERNS = [
    "*",
    "*.txt",
    "**",
    "**/*.txt",
    "**/",
    "a/**/b/*",
    "a/*/*.txt",
    "?/[bc]/*",
    "**/b/**/*.txt",
    "a/../a/*.txt",
    "./*.txt",
    ".*",
    ".h/*",
    "**/.x.txt",
    "a/b",
    "none/*",
    "1.txt/*",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_those_of_glob(work: Path, pattern: str) -> None:
    _make("1.txt", "a/2.txt", "a/b/3.txt", "a/b/c/4.txt", "a/c/b/5.log", "a/b/b/6.txt")
    _make(".h/7.txt", "a/.x.txt", "a/.h/8.txt")
    files = {os.path.realpath(name) for name in glob(pattern, recursive=True)}
    names = [name for name, _ in match(pattern)]
    assert {os.path.realpath(name) for name in names} == set(filter(os.path.isfile, files))
    assert names == sorted(names)
    absolute = [name for name, _ in match(f"{work}/{pattern}")]
    assert absolute == [f"{work}/{name}" for name in names]


def test_each_real_file_once(work: Path) -> None:
    """Links to files and folders, loops of them, links that lead nowhere, and what is no file."""
    _make("c/z/1.txt", "c/z/deep/2.txt", "elsewhere/3.txt")
    os.symlink("z", "c/a")
    os.symlink("../z", "c/z/deep/loop")
    os.symlink(".", "c/z/again")
    os.symlink("..", "c/up")
    os.symlink("1.txt", "c/z/0.txt")
    os.symlink("1.txt", "c/z/9.txt")
    os.symlink("nowhere", "c/z/5.txt")
    os.symlink(work / "elsewhere", "c/other")
    os.mkfifo("c/z/6.txt")
    assert _names("c/**/*.txt") == ["c/other/3.txt", "c/z/1.txt", "c/z/deep/2.txt"]
    assert _names("c/*/*.txt") == ["c/other/3.txt", "c/z/1.txt"]
    assert _names("c/a/*") == ["c/a/1.txt"]
    assert _names("c/z/0.txt") == ["c/z/0.txt"]


def test_many_links_between_folders_take_no_time(work: Path) -> None:
    """Through each other, 12 folders with 12 links have 12! ways."""
    for number in range(12):
        _make(f"d/{number}/x.txt")
        for other in range(12):
            os.symlink(f"../{other}", f"d/{number}/to{other}")
    assert len(_names("d/**/*.txt")) == 12


def test_names_with_anything_in_them(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["[2024] a.txt", "b 'q\" ü.txt", "new\nline.txt", os.fsdecode(b"bad\xff.txt"), "4.txt"]
    _make(*names, ".hidden.txt")
    assert _names("*.txt") == sorted(names)
    assert _names("[2024] a.txt") == ["[2024] a.txt"]
    assert _names("[2-4].txt") == ["4.txt"]
    assert _names("bad?.txt") == [names[3]]
    with pytest.raises(ValidationError, match=r"in a path, write \?"):
        text(names[3])
    monkeypatch.setenv("HOME", str(work))
    assert _names("~/*.txt") == [str(work / name) for name in sorted(names)]
    assert len(read(text("*.txt"))) == 5
    assert len(text("*.txt").units(limit=1)[3].name.splitlines()) == 1
    assert all(hash_file(path) for _, path in text("*.txt").files())


@pytest.mark.parametrize("name", ["new\nline", os.fsdecode(b"bad\xff")])
def test_messages_about_any_name_are_one_printable_line(work: Path, name: str) -> None:
    Path(name).write_bytes(b"\x1f\x8b\x08")
    for source in (jsonl("*"), text("*"), text("new\n*.gz")):
        with pytest.raises(DataError) as caught:
            read(source)
        assert str(caught.value).isprintable()


def test_a_folder_and_nothing(work: Path) -> None:
    _make("corpus/1.txt")
    with pytest.raises(DataError, match=r"a folder \(corpus/\): write corpus/\*\*/\*\.jsonl"):
        read(jsonl("corpus/"))
    for pattern in ("none.txt", "none/*.txt", ""):
        with pytest.raises(DataError, match="no file matches"):
            read(text(pattern))


def test_a_file_that_is_gone_or_cannot_be_read(work: Path) -> None:
    for document in ("file", "line"):
        _make("a.txt", "b.txt", "c.txt")
        source = text("*.txt", document=document)
        units = source.units()
        os.remove("b.txt")
        with pytest.raises(DataError, match=r"cannot read the file: No such file .*\(b\.txt\)"):
            list(source.read(units[0], Trouble("stop")))
        os.symlink("b.txt", "b.txt")
        trouble = Trouble("skip")
        assert list(source.read(units[0], trouble)) == ["a.txt", "c.txt"]
        assert trouble.counts == {"unreadable file": 1}
        os.remove("b.txt")


def test_too_many_open_files_are_no_reason_to_leave_one_out(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make("a.txt")
    units = text("a.txt").units()

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"Too many open files .*ulimit"):
        list(text("a.txt").read(units[0], Trouble("skip")))


def test_fingerprints_of_files(work: Path) -> None:
    content = bytes(range(256)) * 20_000
    Path("x").write_bytes(content)
    assert hash_file("x") == hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match=r"cannot read the file: No such file .*\(gone\)"):
        hash_file("gone")


def test_the_standard_library_is_read_in_the_order_of_its_files(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make("b.py", "a/c.py", "a/test/d.py", "_sysconfigdata_x.py", "site-packages/e.py")
    Path("f.py").write_bytes(b"\xff")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(work))
    source = PythonStdlibSource(kind="python_stdlib")
    assert read(source) == read(source, limit=1) == ["a/c.py", "b.py"]
    assert len(source.units(limit=1)) == 3
    assert [name for name, _ in source.files()] == ["a/c.py", "b.py", "f.py"]
