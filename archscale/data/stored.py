"""One split of a data set as it is stored: a prepared directory, or the files of another project;
here, or behind a URL."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from archscale.config.sections import DataConfig
from archscale.data.foreign.sets import TRAIN, find_files, read_files, sort_into_splits
from archscale.data.foreign.split import ForeignSplit, known_vocabulary, unknown_vocabulary
from archscale.data.foreign.summary import inspect_foreign, verify_foreign
from archscale.data.places import Place, Tokens, locate
from archscale.data.prepared import PreparedSplit
from archscale.data.remote import is_remote
from archscale.data.shards import MANIFEST, Manifest, read_manifest
from archscale.data.tokenizer import Tokenizer, load_kept_tokenizer, load_tokenizer
from archscale.errors import ConfigError, DataError, explain_os_error
from archscale.files import CONFIG, TOKENIZER


class StoredSplit(Protocol):
    """Shards of token ids, one after another.

    Attributes:
        sizes, files: tokens and name of every shard.
        vocab_size: ids are below it.
        eos_id: the token after every document; None: unknown.
        fingerprint: sha256 of the tokenizer, hexadecimal; "": unknown.
        origin: tells the data set from others, wherever it lies.
    """

    sizes: list[int]
    files: list[str]
    vocab_size: int
    eos_id: int | None
    fingerprint: str
    origin: str

    def open(self, number: int) -> Tokens:
        """The ids of a shard; DataError if it is damaged."""

    def token_bytes(self) -> np.ndarray | None:
        """int32 [vocab_size]: UTF-8 bytes each token id stands for, 0 for special tokens; None
        where the tokenizer is unknown."""

    def check(self, vocab_size: int, verify_up_to_bytes: int) -> None:
        """Everything that can be known before step 1; DataError names the first bad file.

        Args:
            vocab_size: ids have to be below it.
            verify_up_to_bytes: a split no larger than this on disk is read whole.
        """


class DataFacts(NamedTuple):
    """What a plan needs to know of a data set: as of its splits, and `tokens` and `files` of each
    that it can be read as."""

    vocab_size: int
    eos_id: int | None
    fingerprint: str
    tokens: dict[str, int]
    files: dict[str, list[str]]


def open_stored(
    path: str | Place, split: str, tokenizer: str | None, vocab_size: int | None
) -> StoredSplit:
    """One split of the data set at a path or URL.

    Args:
        tokenizer: as `data.tokenizer`; a prepared directory has its own, which this has to be.
        vocab_size: of the model, for files that do not say theirs.
    """
    place = locate(path)
    if _is_foreign(place):
        return ForeignSplit(place, split, _loaded(tokenizer), vocab_size)
    manifest = read_manifest(place)
    _refuse_other_tokenizer(tokenizer, manifest, place)
    return PreparedSplit(place, manifest, split)


def describe(path: str | Place, tokenizer: str | None, vocab_size: int | None) -> DataFacts:
    """Facts of the data set at a path or URL; arguments and errors as for `open_stored`."""
    place = locate(path)
    if not _is_foreign(place):
        manifest = read_manifest(place)
        _refuse_other_tokenizer(tokenizer, manifest, place)
        own = manifest.tokenizer
        return DataFacts(
            own.vocab_size,
            own.eos_id,
            own.fingerprint,
            {split: entry.tokens for split, entry in manifest.splits.items()},
            {
                split: [str(place / shard.file) for shard in entry.shards]
                for split, entry in manifest.splits.items()
            },
        )
    splits = {
        split: read_files(files) for split, files in sort_into_splits(find_files(place)).items()
    }
    # Training reads files whose names all say validation, too: they are what it was given.
    splits.setdefault(TRAIN, next(iter(splits.values())))
    first = splits[TRAIN][0]
    loaded = _loaded(tokenizer)
    size = known_vocabulary(first, loaded) or vocab_size
    if size is None:
        raise unknown_vocabulary(first, place)
    return DataFacts(
        size,
        None if loaded is None else loaded.eos_id,
        "" if loaded is None else loaded.fingerprint,
        {split: sum(file.tokens for file in files) for split, files in splits.items()},
        {split: [str(file.place) for file in files] for split, files in splits.items()},
    )


def is_there(path: str) -> bool:
    """Whether there is a data set at a path or URL, even a damaged one."""
    place = locate(path)
    try:
        return (place / MANIFEST).is_file() or bool(find_files(place))
    except DataError:  # a URL that cannot be read here may be readable where training runs
        return not is_remote(path)
    except OSError:
        return False


def refuse_training_files(
    owner: str, held_out: Sequence[str], trained: Sequence[str], path: str
) -> None:
    """ConfigError if a file that is to be held out is one that is trained on, under whichever
    name."""
    names = {real_name(file) for file in trained}
    if shared := [file for file in held_out if real_name(file) in names]:
        remedy = (
            "give other files as data.val, or null"
            if owner == "data.val"
            else "give its path training files, whose names do not all say validation, or leave it"
            " out"
        )
        raise ConfigError(f"{owner} holds out a file that is trained on, {shared[0]}", path, remedy)


def real_name(path: str) -> str:
    """The same for all names of a file or data set here; a URL as it is."""
    return path if is_remote(path) else os.path.realpath(path)


def check_document_mask(data: DataConfig, eos_id: int | None) -> None:
    """ConfigError if documents are to be kept apart and their ends are unknown."""
    if data.document_mask and eos_id is None:
        raise ConfigError(
            "the data do not say which token ends a document",
            "data.document_mask",
            "give the tokenizer as data.tokenizer, or set it to false",
        )


def run_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer of what is trained on. DataError where it is not known."""
    if data.tokenizer is not None:
        return load_named_tokenizer(data.tokenizer)
    for path in data.training_paths:
        if not _is_foreign(locate(path)):
            read_manifest(path)  # says what is wrong, if that is the data set
            return load_tokenizer(path)
    raise DataError(
        "the data do not say which tokenizer they were made with",
        data.training_paths[0],
        "give it as data.tokenizer",
    )


def trained_tokenizer(run_dir: Path, data: DataConfig, trained_on: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a run has kept, or, where it was started before runs kept theirs, that of
    its data.

    Args:
        trained_on: what a checkpoint says of the data (`training_data.identity`).

    Raises:
        DataError: it is gone, damaged or another one.
    """
    sources = trained_on.get("sources", {"": trained_on}).values()
    # A data set made elsewhere may not say which tokenizer it was made with.
    trained_with = next((source["tokenizer"] for source in sources if source["tokenizer"]), "")
    kept = load_kept_tokenizer(run_dir / TOKENIZER)
    try:
        tokenizer = kept or run_tokenizer(data)
    except DataError as error:
        if data.tokenizer is not None or trained_with:
            raise
        remedy = f"give the tokenizer as data.tokenizer in {run_dir / CONFIG}"
        raise DataError(error.what, error.where, remedy) from error
    if trained_with and tokenizer.fingerprint != trained_with:
        raise DataError(
            f"tokenizer {tokenizer.fingerprint[:12]} is there, but the run was trained with"
            f" {trained_with[:12]}",
            str(run_dir / TOKENIZER) if kept else data.training_paths[0],
            "copy the run's own back to there"
            if kept
            else f"name a data directory that has it in {run_dir / CONFIG}",
        )
    return tokenizer


def load_named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a file, a directory, a URL or a name on the Hugging Face hub."""
    here = is_remote(name) or Path(name).exists() or Path(name).suffix in (".model", ".json")
    return load_tokenizer(name, None if here else "huggingface")


def inspect_stored(path: str | Place, tokenizer: str | None) -> dict[str, Any] | None:
    """The summary of another project's files; None where the path names none.

    Raises:
        DataError: a file is wrong, or a prepared data set has another tokenizer.
    """
    place = locate(path)
    if _is_foreign(place):
        return inspect_foreign(place, _loaded(tokenizer))
    if tokenizer is not None:
        _refuse_other_tokenizer(tokenizer, read_manifest(place), place)
    return None


def verify_stored(path: str | Place, tokenizer: str | None) -> list[str] | None:
    """What is wrong with another project's files, a line each; None where the path names none.
    DataError if a prepared data set has another tokenizer."""
    place = locate(path)
    if _is_foreign(place):
        return verify_foreign(place, _loaded(tokenizer))
    if tokenizer is not None:
        _refuse_other_tokenizer(tokenizer, read_manifest(place), place)
    return None


def _loaded(tokenizer: str | None) -> Tokenizer | None:
    return None if tokenizer is None else load_named_tokenizer(tokenizer)


def _is_foreign(place: Place) -> bool:
    try:
        return not (place / MANIFEST).is_file() and bool(find_files(place))
    except OSError as error:
        cause, remedy = explain_os_error(error, "check the path")
        raise DataError(f"cannot read the data set: {cause}", str(place), remedy) from error


def _refuse_other_tokenizer(tokenizer: str | None, manifest: Manifest, place: Place) -> None:
    if tokenizer is None:
        return
    if load_named_tokenizer(tokenizer).fingerprint != manifest.tokenizer.fingerprint:
        raise DataError(
            f"tokenizer {tokenizer} is not the one that the data set was made with",
            str(place),
            "leave it out (data.tokenizer: null): a prepared data set has its own",
        )
