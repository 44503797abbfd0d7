"""Tokenizers behind one small interface: SentencePiece models and Hugging Face `tokenizer.json`.

Text is data: `encode` never turns the spelling of a special token into that token, and for a model
trained here `decode(encode(text)) == text` for every string that UTF-8 can hold.
"""

import hashlib
import heapq
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from archscale.data.places import Place, locate
from archscale.data.shards import AGAIN, MANIFEST, read_manifest
from archscale.errors import DataError, explain_os_error

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
SAMPLE_BYTES = 10_000_000  # text that a tokenizer is trained on: more hardly changes a BPE
_DOCUMENT_BYTES = 1_000_000  # of which no document gives more than this
_CHUNK_CHARS = (
    1_000  # text per training "sentence": across line ends, so that ":\n" can become a token
)
# how SentencePiece writes a space; it cannot tell it from the same character in the text
_SPACE = "\u2581"
_EOS_NAMES = ("<eos>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "[EOS]")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        file: name that `content` is saved under.
        content: the tokenizer, serialized.
        fingerprint: sha256 of `content`, hexadecimal.
        vocab_size: ids are in [0, vocab_size).
        eos_id: the token after every document.
    """

    kind: str
    file: str

    def __init__(self, content: bytes, vocab_size: int, eos_id: int):
        self.content, self.vocab_size, self.eos_id = content, vocab_size, eos_id
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, on all cores; no special tokens are added."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text; special tokens stand for nothing, bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes each id stands for, 0 for special tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of one text; no special tokens are added."""
        return self.encode_batch([text])[0]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with an end-of-document piece."""

    kind, file = "sentencepiece", MODEL_FILE

    def __init__(self, content: bytes, where: str):
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = model = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                "not a SentencePiece model", where, "give the path of a .model file"
            ) from error
        if model.eos_id() < 0:
            raise DataError(
                "the tokenizer has no end-of-document token", where, "train it with an eos piece"
            )
        super().__init__(content, model.vocab_size(), model.eos_id())
        self._pieces = [self._bytes(i) for i in range(self.vocab_size)]
        # Models trained elsewhere may put a space before every text; it is not part of the text.
        self._prefixed = model.id_to_piece(model.encode("a")[0]).startswith(_SPACE)
        mark = _SPACE.encode()
        self._mark_ids = (
            [self._pieces.index(mark[i : i + 1]) for i in range(3)] if self._has_bytes() else []
        )

    def _bytes(self, token: int) -> bytes:
        if self._model.is_control(token) or self._model.is_unknown(token):
            return b""
        piece = self._model.id_to_piece(token)
        return (
            bytes([int(piece[3:5], 16)])
            if self._model.is_byte(token)
            else piece.replace(_SPACE, " ").encode()
        )

    def _has_bytes(self) -> bool:
        return any(self._model.is_byte(token) for token in range(self.vocab_size))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids = self._model.encode(texts, num_threads=-1)
        if self._mark_ids and not self._prefixed:
            for i, text in enumerate(texts):
                if _SPACE in text:
                    ids[i] = self._encode_marks(text)
        return ids

    def _encode_marks(self, text: str) -> list[int]:
        # U+2581 in the text would come back as a space: spell it in bytes.
        first, *rest = self._model.encode(text.split(_SPACE))
        return first + [token for part in rest for token in self._mark_ids + part]

    def decode(self, ids: list[int]) -> str:
        text = b"".join(self._pieces[i] for i in ids).decode("utf-8", errors="replace")
        return text[1:] if self._prefixed and text.startswith(" ") else text

    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], np.int32)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, as the `tokenizers` package reads it."""

    kind, file = "huggingface", JSON_FILE

    def __init__(
        self, content: bytes, where: str, eos_id: int | None = None, eos: str | None = None
    ):
        backend_class = _import("tokenizers", where).Tokenizer
        try:
            self._backend = backend = backend_class.from_str(content.decode())
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"not a tokenizer.json: {error}", where, "give a Hugging Face fast tokenizer"
            ) from error
        # "<|endoftext|>" spelled in a document is text, not the end of the document.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if eos_id is None:
            names = (eos,) if eos else _EOS_NAMES
            eos_id = next((vocabulary[name] for name in names if name in vocabulary), None)
        if eos_id is None:
            problem = f"no end-of-document token: none of {', '.join(names)} is in the vocabulary"
            raise DataError(problem, where, "name it as tokenizer.eos in the recipe")
        super().__init__(content, max(vocabulary.values()) + 1, eos_id)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        table = np.zeros(self.vocab_size, np.int32)
        added = self._backend.get_added_tokens_decoder()
        byte_level = '"ByteLevel"' in self._backend.to_str()
        for piece, token in self._backend.get_vocab(with_added_tokens=True).items():
            if token in added:
                table[token] = 0 if added[token].special else len(added[token].content.encode())
            elif byte_level:  # one character a byte
                table[token] = len(piece)
            elif len(piece) == 6 and piece.startswith("<0x"):
                table[token] = 1
            else:
                table[token] = len(piece.replace(_SPACE, " ").encode())
        return table


def _import(package: str, where: str):
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        problem = f"the package {package!r} is not installed"
        raise DataError(problem, where, "pip install transformers datasets") from error


def _from_hub(name: str, eos: str | None) -> Tokenizer:
    """From a directory of Hugging Face files, or the hub; the eos token is the one its
    configuration names."""
    transformers = _import("transformers", name)
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
    return HuggingFaceTokenizer(content, name, eos=eos or tokenizer.eos_token)


def load_tokenizer(path: str | Place, kind: str | None = None, eos: str | None = None) -> Tokenizer:
    """The tokenizer of a dataset directory, of a `.model` or `.json` file, or of the Hugging Face
    hub.

    Args:
        path: dataset directory, directory with Hugging Face tokenizer files, file, or hub name.
        kind: "sentencepiece" or "huggingface"; by default from what `path` is. A hub name needs
            "huggingface". eos: spelling of the end-of-document token, for Hugging Face tokenizers
            whose own is missing or other.

    Raises:
        DataError: missing, foreign, not the one the dataset was made with, or its package is not
            installed.
    """
    local = locate(path)
    if (local / MANIFEST).is_file():
        return _of_dataset(local)
    try:
        if kind == "sentencepiece" or (kind is None and local.suffix == ".model"):
            return SentencePieceTokenizer(local.read_bytes(), str(path))
        if local.suffix == ".json":
            return HuggingFaceTokenizer(local.read_bytes(), str(path), eos=eos)
    except OSError as error:
        cause, remedy = explain_os_error(error, "check the path")
        raise DataError(f"cannot read the tokenizer: {cause}", str(path), remedy) from error
    if kind == "huggingface" or (local / JSON_FILE).is_file():
        return _from_hub(str(path), eos)
    remedy = "give a dataset directory, a .model file or a tokenizer.json"
    raise DataError("no tokenizer there", str(path), remedy)


def _of_dataset(directory: Place) -> Tokenizer:
    entry = read_manifest(directory).tokenizer
    path, remedy = (
        directory / entry.file,
        f"copy the file again from where it is whole, or prepare anew: {AGAIN}",
    )
    try:
        content = path.read_bytes()
    except OSError as error:
        cause, remedy = explain_os_error(error, remedy)
        raise DataError(f"cannot read the tokenizer: {cause}", str(path), remedy) from error
    if hashlib.sha256(content).hexdigest() != entry.fingerprint:
        raise DataError("not the tokenizer that the dataset was made with", str(path), remedy)
    if entry.kind == "sentencepiece":
        return SentencePieceTokenizer(content, str(path))
    return HuggingFaceTokenizer(content, str(path), eos_id=entry.eos_id)


def _sample(texts: Iterable[str], seed: int) -> list[str]:
    """SAMPLE_BYTES of text in whole documents (long ones cut): those with the lowest hashes, in the
    order of the hash.

    So the sample depends on what documents there are, never on their order, and takes no more
    memory than itself.
    """
    heap: list[tuple[int, str]] = []  # (-hash, text): the highest hash is the first to go
    held = 0
    for text in texts:
        text = text[:_DOCUMENT_BYTES]
        encoded = text.encode("utf-8", errors="replace")
        rank = int.from_bytes(hashlib.sha256(b"%d:" % seed + encoded).digest()[:8])
        if held >= SAMPLE_BYTES and rank >= -heap[0][0]:
            continue
        heapq.heappush(heap, (-rank, text))
        held += len(encoded)
        while (
            len(heap) > 1
            and held - (size := len(heap[0][1].encode("utf-8", errors="replace"))) >= SAMPLE_BYTES
        ):
            heapq.heappop(heap)
            held -= size
    return [text for _, text in sorted(heap, reverse=True)]


def _chunks(text: str) -> Iterator[str]:
    chunk = ""
    for line in text.splitlines(keepends=True):
        if chunk and len(chunk) + len(line) > _CHUNK_CHARS:
            yield chunk
            chunk = ""
        chunk += line
    if chunk:
        yield chunk


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, out_dir: str | Path, seed: int = 0
) -> Tokenizer:
    """Trains a BPE with byte fallback that loses nothing, and writes it to
    `out_dir/tokenizer.model`.

    The same documents, in any order, give the same file.

    Args:
        texts: documents; about 10 MB of them are used, chosen by content hash.
        vocab_size: pieces, among them 256 bytes, <unk> and <eos>.
        out_dir: an existing directory.
        seed: another seed chooses other documents, where there are more than are used.

    Raises:
        DataError: too little text for so many pieces, or too small a vocabulary for its characters.
    """
    from sentencepiece import SentencePieceTrainer

    path, written = Path(out_dir) / MODEL_FILE, io.BytesIO()
    where, remedy = "tokenizer.train", "change vocab_size, or give the tokenizer more text"
    sample = _sample(texts, seed)
    if not any(sample):
        raise DataError("no text to train a tokenizer on", where, "check the sources of the recipe")
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(chunk for text in sample for chunk in _chunks(text)),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,  # the rarest characters are spelled in bytes
            # Lossless: no Unicode folding, no stripped or merged or added spaces.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            eos_piece="<eos>",
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _DOCUMENT_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        # without its source location
        reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
        raise DataError(f"cannot train {vocab_size} pieces: {reason}", where, remedy) from error
    path.write_bytes(written.getvalue())
    return SentencePieceTokenizer(written.getvalue(), str(path))
