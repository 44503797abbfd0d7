"""The foreign files that a path names, and the splits that their names say."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from archscale.data.foreign import datatrove, llmc, megatron
from archscale.data.foreign.files import ForeignFile
from archscale.data.places import Place, files_in
from archscale.data.remote import REQUESTS, RemotePath
from archscale.data.shards import SPLITS
from archscale.errors import DataError, explain_os_error

TRAIN, VALIDATION = SPLITS
_BESIDE = (datatrove.METADATA, datatrove.INDEX, datatrove.LOSS)
# A word of its own: "constrained" and "interval" say nothing.
_WORD = re.compile(r"(?<![a-z])(train(?:ing)?|val(?:id(?:ation)?)?|test)(?![a-z])")


def find_files(place: Place) -> list[Place]:
    """The `.bin` and `.ds` that a path names: a directory, a pattern, a file, one that stands
    beside it, or Megatron's prefix; sorted by name, none if it names no such thing.

    Raises:
        DataError: a Megatron index without its ids.
    """
    entries = files_in(place)
    if not entries:
        entries = _single(place)
    names = {str(entry) for entry in entries}
    for entry in entries:
        if entry.name.endswith(".idx"):
            ids = entry.with_name(entry.name.removesuffix(".idx") + ".bin")
            if str(ids) not in names and not ids.is_file():
                problem = f"Megatron's index without the ids: there is no {ids.name}"
                raise DataError(problem, str(entry), "copy the .bin to stand beside it")
    return [entry for entry in entries if entry.suffix in (".bin", ".ds")]


def _single(place: Place) -> list[Place]:
    """The file that a path names, by its own name, that of a file beside it, or a prefix."""
    name = place.name
    for suffix in _BESIDE:
        name = name.removesuffix(suffix) if name.endswith(".ds" + suffix) else name
    if name.endswith(".idx"):
        name = name.removesuffix(".idx") + ".bin"
    elif not name.endswith((".bin", ".ds")):
        if not name or not place.with_name(name + ".idx").is_file():
            return []
        name += ".bin"
    file = place.with_name(name)
    return [file] if file.is_file() else []


def sort_into_splits(files: list[Place]) -> dict[str, list[Place]]:
    """split → files, as their names say; where they say nothing, all are for training. Those called
    test are in none.

    Raises:
        DataError: some names say their split and others nothing, or one says two.
    """
    said: dict[str, list[Place]] = {}
    for file in files:
        words = {match[:3]: match for match in _WORD.findall(file.name.lower())}
        if len(words) > 1:
            raise DataError(
                f"the name says {' and '.join(words.values())}, which are different splits",
                str(file),
                "rename it, or give a link to it whose name says one of them",
            )
        said.setdefault("".join(words), []).append(file)
    if len(said) == 1:
        return {VALIDATION if "val" in said else TRAIN: files}
    if "" in said:
        raise DataError(
            f"of these files, some names say train or val and {len(said[''])} do not",
            str(said[""][0]),
            "give the files of one split by a pattern, such as data.train: 'DIR/*train*.bin'",
        )
    splits = {TRAIN: said.get("tra", []), VALIDATION: said.get("val", [])}
    return {split: members for split, members in splits.items() if members}


def files_of(place: Place, split: str) -> list[Place]:
    """The files of one split that a path names. Where their names tell no splits apart, they are
    those of whichever split is asked for.

    Raises:
        DataError: there are none.
    """
    splits = sort_into_splits(find_files(place))
    if split not in splits and len(splits) != 1:
        there = ", ".join(splits) or "none"
        raise DataError(f"no split {split!r}", str(place), f"use one of: {there}")
    return splits.get(split) or next(iter(splits.values()))


def read_files(files: list[Place]) -> list[ForeignFile]:
    """What the files say of themselves.

    Raises:
        DataError: one is wrong, or they are not all of one kind, dtype and tokenizer.
    """
    if any(isinstance(file, RemotePath) for file in files):
        with ThreadPoolExecutor(REQUESTS) as pool:
            read = list(pool.map(_read, files))
    else:
        read = [_read(file) for file in files]
    for aspect, remedy in (
        ("kind", "give the files of one kind by a pattern"),
        ("dtype", "give the files of one dtype by a pattern"),
        ("tokenizer", "give the files of one tokenizer by a pattern"),
    ):
        first = getattr(read[0], aspect)
        for file in read:
            if (value := getattr(file, aspect)) != first:
                raise DataError(
                    f"mixed files: the {aspect} of {read[0].place.name} is {first or 'unknown'},"
                    f" that of {file.place.name} {value or 'unknown'}",
                    str(file.place),
                    remedy,
                )
    return read


def _read(place: Place) -> ForeignFile:
    reader: Callable[[Place], ForeignFile]
    try:
        if place.suffix == ".ds":
            reader = datatrove.read
        elif megatron.index_of(place).is_file():
            reader = megatron.read
        else:
            reader = llmc.read
        return reader(place)
    except OSError as error:
        cause, remedy = explain_os_error(error, "check the path", vanished=True)
        where = error.filename if isinstance(error.filename, (str, Path)) else place
        raise DataError(f"cannot read the file: {cause}", str(where), remedy) from error
