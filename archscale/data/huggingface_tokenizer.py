"""A `tokenizer.json`, as the `tokenizers` package reads it."""

import functools
import importlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from archscale.data.tokenizer_base import Tokenizer, inner_pairs
from archscale.errors import DataError

JSON_FILE = "tokenizer.json"
SPACE = "\u2581"  # how Metaspace writes a space
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_EOS_NAMES = ("<eos>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "[EOS]")

# Where pre-tokenizers usually separate: before white space, and after punctuation.
_BORDER = re.compile(r"(?<=\w)(?=\s\S)|(?<=[^\w\s])(?=\w)")
_TRIES = 1_000  # borders looked at before a text is encoded whole
_WINDOW = 500  # characters on each side of a cut in which both ways are compared
_SYNCHRONIZED = 3  # pre-tokens on each side of a cut that show that the window began nowhere odd


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face fast tokenizer.

    Args:
        content: of the `tokenizer.json` file.
        where: its name, for messages.
        eos: the token that ends a document; by default the first usual one in the vocabulary.
        eos_id: its id, where a data set has recorded it.

    Raises:
        DataError: not a tokenizer, or no such token.
    """

    kind, file = "huggingface", JSON_FILE

    def __init__(
        self, content: bytes, where: str, eos: str | None = None, eos_id: int | None = None
    ):
        self._backend = backend = _load(content, where)
        self._vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if eos_id is None:
            names = _EOS_NAMES if eos is None else (eos,)
            known = (self._vocabulary.get(name) for name in names)
            eos_id = next((token for token in known if token is not None), None)
        if eos_id is None:
            problem = f"no end-of-document token: none of {', '.join(names)} is in the vocabulary"
            raise DataError(problem, where, "name it as tokenizer.eos in the recipe")
        self._structure: dict[str, Any] = json.loads(backend.to_str())
        self._added = backend.get_added_tokens_decoder()
        eos_text = (
            self._added[eos_id].content if eos_id in self._added else backend.decode([eos_id])
        )
        super().__init__(content, max(self._vocabulary.values()) + 1, eos_id, eos_text)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        batch = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def _encode_piece(self, text: str, first: bool) -> list[int]:
        backend = self._backend if first else self._continuing
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @functools.cached_property
    def _continuing(self):
        """The same tokenizer without a space before the text."""
        structure = json.loads(self._backend.to_str())
        for part in [*_parts(structure["normalizer"]), *_parts(structure["pre_tokenizer"])]:
            changes: dict[str, dict[str, Any]] = {
                "Prepend": {"prepend": ""},
                "Metaspace": {"prepend_scheme": "never"},
                "ByteLevel": {"add_prefix_space": False},
            }
            part.update(changes.get(part["type"], {}))
        if structure == self._structure:
            return self._backend
        return _load(json.dumps(structure).encode(), "the tokenizer")

    @functools.cached_property
    def _prefixes_parts(self) -> bool:
        """Whether it puts a space before a text, and added tokens cut the text into parts, each of
        which gets one."""
        written = any(
            token != self.eos_id and not added.special for token, added in self._added.items()
        )
        return written and self._continuing is not self._backend

    def _cut(self, text: str, position: int) -> int:
        if self._prefixes_parts:
            return len(text)
        borders = _BORDER.finditer(text, position)
        for _, border in zip(range(_TRIES), borders):
            if self._separate(text, border.start()):
                return border.start()
        return len(text)

    def _separate(self, text: str, cut: int) -> bool:
        """Whether both sides of a cut give the same tokens apart as together, as far as what
        stands near it shows."""
        left, right = text[max(0, cut - _WINDOW) : cut], text[cut : cut + _WINDOW]
        if self._joined is not None:
            if left[-1:] + right[:1] in self._joined:
                return False
        elif not self._pre_tokenize_apart(left, right):
            return False
        together = self._encode_piece(left + right, False)
        return together == self._encode_piece(left, False) + self._encode_piece(right, False)

    def _pre_tokenize_apart(self, left: str, right: str) -> bool:
        before, after = self._pre_tokens(left), self._pre_tokens(right)
        return (
            min(len(before), len(after)) >= _SYNCHRONIZED
            and self._pre_tokens(left + right) == before + after
        )

    def _pre_tokens(self, text: str) -> list[str]:
        backend = self._continuing
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is None:
            return [text]
        return [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    @functools.cached_property
    def _joined(self) -> frozenset[str] | None:
        """The pairs of characters that a token may hold, where nothing splits the text before a
        BPE with bytes joins it, as in Llama 2; None for all other tokenizers."""
        structure, model = self._structure, self._structure["model"]
        if model["type"] != "BPE" or not model.get("byte_fallback"):
            return None
        for part in _parts(structure["normalizer"]):
            spaces = part.get("pattern") == {"String": " "} and part.get("content") == SPACE
            if not (
                part["type"] in ("Sequence", "Prepend") or (part["type"] == "Replace" and spaces)
            ):
                return None
        splits = structure["pre_tokenizer"]
        if splits is not None and not (splits["type"] == "Metaspace" and not splits["split"]):
            return None
        return inner_pairs(piece.replace(SPACE, " ") for piece in self._vocabulary)

    @functools.cached_property
    def _silent(self) -> frozenset[int]:
        """The ids that stand for no text. Bytes do, even where a tokenizer calls them special."""
        model = self._structure["model"]
        special = {
            token
            for token, added in self._added.items()
            if added.special and not (model.get("byte_fallback") and _BYTE.fullmatch(added.content))
        }
        # A unigram model has the id, all others the name.
        unknown = self._vocabulary.get(model.get("unk_token") or "", model.get("unk_id"))
        return frozenset({self.eos_id, *special} | {unknown} - {None})

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(
            [token for token in ids if token not in self._silent], skip_special_tokens=False
        )

    def token_bytes(self) -> np.ndarray:
        table = np.zeros(self.vocab_size, np.int32)
        length = _length_in_bytes(self._structure)
        for piece, token in self._vocabulary.items():
            if token not in self._silent:
                written = token in self._added and not _BYTE.fullmatch(piece)
                table[token] = len(piece.encode()) if written else length(piece)
        return table


def _parts(component: dict | None) -> Iterator[dict]:
    """A normalizer, pre-tokenizer or decoder, and all members if it is a sequence."""
    if component is not None:
        yield component
        for key in ("normalizers", "pretokenizers", "decoders"):
            for member in component.get(key, ()):
                yield from _parts(member)


def _length_in_bytes(structure: dict) -> Callable[[str], int]:
    """piece of the vocabulary → UTF-8 bytes that it stands for, by what the tokenizer does with it
    when it decodes."""
    model = structure["model"]
    names = {part["type"] for part in _parts(structure["decoder"])}
    names |= {part["type"] for part in _parts(structure["pre_tokenizer"])}
    if "ByteLevel" in names:  # one character a byte
        return len
    bytes_spelled = model.get("byte_fallback") or "ByteFallback" in names
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""

    def length(piece: str) -> int:
        if bytes_spelled and _BYTE.fullmatch(piece):
            return 1
        if suffix and piece.endswith(suffix):
            piece = piece.removesuffix(suffix) + " "
        return len(piece.removeprefix(prefix).replace(SPACE, " ").encode())

    return length


def _load(content: bytes, where: str):
    tokenizer_class = import_package("tokenizers", where).Tokenizer
    try:
        backend = tokenizer_class.from_str(content.decode())
    except Exception as error:  # the package raises bare Exception
        raise DataError(
            f"not a tokenizer.json: {error}", where, "give a Hugging Face fast tokenizer"
        ) from error
    # "<|endoftext|>" spelled in a document is text, not the end of the document.
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend


def import_package(package: str, where: str):
    """A package of the `hf` extra. DataError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        problem = f"the package {package!r} is not installed"
        raise DataError(problem, where, "pip install archscale[hf]") from error


def from_hub(name: str, eos: str | None) -> HuggingFaceTokenizer:
    """From a directory of Hugging Face files, or the hub; the eos token is the one its
    configuration names."""
    transformers = import_package("transformers", name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # network, missing files, unknown classes: all the same to the user
        first = str(error).strip().splitlines()[0]
        raise DataError(
            f"cannot load the tokenizer: {first}", name, "check the path or hub name"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError("the tokenizer has no fast version", name, "convert it to a tokenizer.json")
    content = backend.to_str(pretty=True).encode()
    return HuggingFaceTokenizer(content, name, eos=tokenizer.eos_token if eos is None else eos)
