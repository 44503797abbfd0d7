"""One split of files that another project wrote, read where they lie."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from archscale.data.foreign.files import ForeignFile
from archscale.data.foreign.sets import files_of, read_files
from archscale.data.places import Place, Tokens
from archscale.data.remote import REQUESTS
from archscale.data.tokenizer import Tokenizer
from archscale.errors import DataError, explain_os_error

# Tokenizers that datatrove names, and their vocabularies.
VOCABULARIES = {
    "gpt2": 50257,
    "openai-community/gpt2": 50257,
    "meta-llama/Llama-2-7b-hf": 32000,
    "mistralai/Mistral-7B-v0.1": 32000,
    "HuggingFaceTB/cosmo2-tokenizer": 49152,
    "HuggingFaceTB/SmolLM2-135M": 49152,
    "meta-llama/Meta-Llama-3-8B": 128256,
    "meta-llama/Llama-3.1-8B": 128256,
    "meta-llama/Llama-3.2-1B": 128256,
}


class ForeignSplit:
    """The files of one split; a `StoredSplit`.

    Args:
        path: that names the files, as in `find_files`.
        split: "train" or "validation".
        tokenizer: that the files were made with; None: unknown.
        vocab_size: of the model; None: from the tokenizer.

    Raises:
        DataError: a file is wrong, no file is of this split, or the vocabulary is unknown.
    """

    def __init__(
        self, path: Place, split: str, tokenizer: Tokenizer | None, vocab_size: int | None
    ):
        self._files = read_files(files_of(path, split))
        self._tokenizer = tokenizer
        self.vocab_size = known_vocabulary(self._files[0], tokenizer) or vocab_size or 0
        if not self.vocab_size:
            raise unknown_vocabulary(self._files[0], path)
        self.eos_id = None if tokenizer is None else tokenizer.eos_id
        self.fingerprint = "" if tokenizer is None else tokenizer.fingerprint
        self.sizes = [file.tokens for file in self._files]
        self.files = [str(file.place) for file in self._files]
        self.origin = _origin(self._files)

    def open(self, number: int) -> Tokens:
        return self._files[number].open()

    def token_bytes(self) -> np.ndarray | None:
        return None if self._tokenizer is None else self._tokenizer.token_bytes()

    def check(self, vocab_size: int, verify_up_to_bytes: int) -> None:
        whole = sum(file.size for file in self._files) <= verify_up_to_bytes
        for file in self._files:
            if file.verify is not None:
                file.verify()
            if whole:
                file.check_ids(vocab_size)


def known_vocabulary(file: ForeignFile, tokenizer: Tokenizer | None) -> int | None:
    """Size of the vocabulary, by the tokenizer or its name; None where neither is known."""
    if tokenizer is not None:
        return tokenizer.vocab_size
    return VOCABULARIES.get(file.tokenizer or "")


def unknown_vocabulary(file: ForeignFile, path: Place) -> DataError:
    problem = f"{file.kind} files do not say how large their vocabulary is"
    if file.tokenizer:
        problem = f"the vocabulary of {file.tokenizer} is not known here"
    return DataError(problem, str(path), "give model.vocab_size, or data.tokenizer")


def _origin(files: list[ForeignFile]) -> str:
    """Hexadecimal hash of names, sizes and excerpts: another set of files has another."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(REQUESTS) as pool:
        for file, excerpts in zip(files, pool.map(_excerpts, files)):
            facts = f"\n{file.size}\n{len(file.start)}\n{len(excerpts)}\n"
            digest.update(file.place.name.encode(errors="surrogateescape") + facts.encode())
            digest.update(file.start + excerpts)
    return digest.hexdigest()


def _excerpts(file: ForeignFile) -> bytes:
    try:
        return file.excerpts()
    except OSError as error:
        cause, remedy = explain_os_error(error, "check the path", vanished=True)
        raise DataError(f"cannot read the file: {cause}", str(file.place), remedy) from error
