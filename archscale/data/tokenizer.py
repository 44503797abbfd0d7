"""Where tokenizers are loaded from, and the copy that a run keeps of its own."""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from archscale.data.huggingface_tokenizer import JSON_FILE, HuggingFaceTokenizer, from_hub
from archscale.data.places import Place, locate
from archscale.data.sentencepiece_tokenizer import SentencePieceTokenizer
from archscale.data.shards import AGAIN, MANIFEST, TokenizerEntry, read_manifest
from archscale.data.tokenizer_base import Tokenizer
from archscale.data.train_tokenizer import train_sentencepiece
from archscale.errors import DataError, explain_os_error
from archscale.files import write_atomically

__all__ = [
    "Tokenizer",
    "keep_tokenizer",
    "load_kept_tokenizer",
    "load_tokenizer",
    "recorded_tokenizer",
    "train_sentencepiece",
]

_CONFIGS = (MANIFEST, "config.json", "tokenizer_config.json")
_DESCRIPTION = "kept.json"  # beside the file of a kept tokenizer: a TokenizerEntry
_COPY = "copy the file again from where it is whole"


def load_tokenizer(path: str | Place, kind: str | None = None, eos: str | None = None) -> Tokenizer:
    """The tokenizer of a dataset directory, of a `.model` or `.json` file, or of the Hugging Face
    hub.

    Args:
        path: dataset directory, directory with Hugging Face tokenizer files, file, or hub name.
        kind: "sentencepiece" or "huggingface"; by default from what `path` is. A hub name needs
            "huggingface".
        eos: spelling of the end-of-document token, where it is not the tokenizer's (the dataset's)
            own.

    Raises:
        DataError: missing, foreign, without an end-of-document token, not the one the dataset was
            made with, or its package is not installed.
    """
    local = locate(path)
    configured = any((local / name).is_file() for name in _CONFIGS)
    if kind != "sentencepiece" and (local / JSON_FILE).is_file() and not configured:
        local /= JSON_FILE  # transformers 4 loads no directory without a configuration
    if (local / MANIFEST).is_file():
        entry = read_manifest(local).tokenizer
        return recorded_tokenizer(
            entry, local / entry.file, f"{_COPY}, or prepare anew: {AGAIN}", eos
        )
    try:
        if kind == "sentencepiece" or (kind is None and local.suffix == ".model"):
            return SentencePieceTokenizer(local.read_bytes(), str(path), eos)
        if local.suffix == ".json":
            return HuggingFaceTokenizer(local.read_bytes(), str(path), eos)
    except OSError as error:
        cause, remedy = explain_os_error(error, "check the path")
        raise DataError(f"cannot read the tokenizer: {cause}", str(path), remedy) from error
    if kind == "huggingface" or (local / JSON_FILE).is_file():
        return from_hub(str(path), eos)
    remedy = "give a dataset directory, a .model file or a tokenizer.json"
    raise DataError("no tokenizer there", str(path), remedy)


def keep_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes a tokenizer into a directory of its own, each file whole or not at all."""
    entry = TokenizerEntry(
        kind=tokenizer.kind,
        file=tokenizer.file,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
    directory.mkdir(exist_ok=True)
    write_atomically(directory / entry.file, tokenizer.content)
    write_atomically(directory / _DESCRIPTION, entry.model_dump_json(indent=2))


def load_kept_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer that `keep_tokenizer` has put there; None without one.

    Raises:
        DataError: it is damaged.
    """
    path = directory / _DESCRIPTION
    try:
        entry = TokenizerEntry.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        cause, remedy = explain_os_error(error, _COPY)
        raise DataError(f"cannot read the kept tokenizer: {cause}", str(path), remedy) from error
    except ValidationError as error:
        problem = f"the kept tokenizer is damaged: {error.errors()[0]['msg']}"
        raise DataError(problem, str(path), _COPY) from error
    return recorded_tokenizer(entry, directory / entry.file, _COPY)


def _read(entry: TokenizerEntry, path: Place, remedy: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        cause, remedy = explain_os_error(error, remedy)
        raise DataError(f"cannot read the tokenizer: {cause}", str(path), remedy) from error
    if hashlib.sha256(content).hexdigest() != entry.fingerprint:
        raise DataError("not the tokenizer that the dataset was made with", str(path), remedy)
    return content


def recorded_tokenizer(
    entry: TokenizerEntry, path: Place, remedy: str, eos: str | None = None
) -> Tokenizer:
    """The tokenizer that `entry` describes, from its file at `path`; DataError with this remedy if
    that is another one."""
    content = _read(entry, path, remedy)
    kinds = {"sentencepiece": SentencePieceTokenizer, "huggingface": HuggingFaceTokenizer}
    if entry.kind not in kinds:
        raise DataError(f"no such kind of tokenizer: {entry.kind!r}", str(path), remedy)
    return kinds[entry.kind](content, str(path), eos, None if eos else entry.eos_id)
