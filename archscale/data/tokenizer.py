"""Tokenizers behind one small interface: where they are loaded from."""

import hashlib
from pathlib import Path

from archscale.data.huggingface_tokenizer import JSON_FILE, HuggingFaceTokenizer, from_hub
from archscale.data.sentencepiece_tokenizer import SentencePieceTokenizer
from archscale.data.shards import AGAIN, MANIFEST, TokenizerEntry, read_manifest
from archscale.data.tokenizer_base import Tokenizer
from archscale.data.train_tokenizer import train_sentencepiece
from archscale.errors import DataError, explain_os_error

__all__ = ["Tokenizer", "load_tokenizer", "recorded_tokenizer", "train_sentencepiece"]


def load_tokenizer(path: str | Path, kind: str | None = None, eos: str | None = None) -> Tokenizer:
    """The tokenizer of a dataset directory, of a `.model` or `.json` file, or of the Hugging Face
    hub.

    Args:
        path: dataset directory, directory with Hugging Face tokenizer files, file, or hub name.
        kind: "sentencepiece" or "huggingface"; by default from what `path` is. A hub name needs
            "huggingface".
        eos: spelling of the end-of-document token, for tokenizers whose own is missing or another;
            a dataset has recorded its own.

    Raises:
        DataError: missing, foreign, without an end-of-document token, not the one the dataset was
            made with, or its package is not installed.
    """
    local = Path(path)
    if (local / MANIFEST).is_file():
        entry = read_manifest(local).tokenizer
        remedy = f"copy the file again from where it is whole, or prepare anew: {AGAIN}"
        return recorded_tokenizer(entry, local / entry.file, remedy)
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


def _read(entry: TokenizerEntry, path: Path, remedy: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        cause, remedy = explain_os_error(error, remedy)
        raise DataError(f"cannot read the tokenizer: {cause}", str(path), remedy) from error
    if hashlib.sha256(content).hexdigest() != entry.fingerprint:
        raise DataError("not the tokenizer that the dataset was made with", str(path), remedy)
    return content


def recorded_tokenizer(entry: TokenizerEntry, path: Path, remedy: str) -> Tokenizer:
    """The tokenizer that `entry` describes, from its file at `path`; DataError with this remedy if
    that is another one."""
    content = _read(entry, path, remedy)
    kinds = {"sentencepiece": SentencePieceTokenizer, "huggingface": HuggingFaceTokenizer}
    return kinds[entry.kind](content, str(path), eos_id=entry.eos_id)
