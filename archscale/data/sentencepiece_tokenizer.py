"""SentencePiece models, trained here or elsewhere."""

import functools
from collections.abc import Iterator

import numpy as np

from archscale.data.tokenizer_base import Tokenizer, inner_pairs
from archscale.errors import DataError

MODEL_FILE = "tokenizer.model"
# how SentencePiece writes a space; it cannot tell it from the same character in the text
SPACE = "\u2581"

# Field numbers of sentencepiece_model.proto, and a value of one of them.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TYPE, _USER_DEFINED = 3, 4
_MODEL_TYPE, _SPACE_AFTER_WORD, _BPE = 3, 24, 2
_CHARACTER_MAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES = 2, 3, 4
# Appended to a model, this sets normalizer_spec.add_dummy_prefix to false: of a field that stands
# twice, the later value counts, and messages are merged field by field.
_NO_DUMMY_PREFIX = bytes([_NORMALIZER << 3 | 2, 2, _ADD_DUMMY_PREFIX << 3, 0])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with an end-of-document piece.

    Args:
        content: of the `.model` file.
        where: its name, for messages.
        eos: the piece that ends a document, if not the model's own.
        eos_id: its id, where a data set has recorded it.

    Attributes:
        has_space: whether a space is a piece. has_bytes: whether every byte is one.
        prefixed: whether the model puts a space before every text.

    Raises:
        DataError: not a model, or no such piece.
    """

    kind, file = "sentencepiece", MODEL_FILE

    def __init__(
        self, content: bytes, where: str, eos: str | None = None, eos_id: int | None = None
    ):
        self._model = model = _load(content, where)
        if eos_id is None:
            eos_id = _find_eos(model, where, eos)
        eos_text = model.id_to_piece(eos_id).replace(SPACE, " ")
        super().__init__(content, model.vocab_size(), eos_id, eos_text)
        # else a text's spaces become the bytes of the mark
        self.has_space = not model.is_unknown(model.piece_to_id(SPACE))
        self._pieces_bytes = [self._bytes(token) for token in range(self.vocab_size)]
        self.has_bytes = any(model.is_byte(token) for token in range(self.vocab_size))
        # Models trained elsewhere may put a space before every text; it is not part of the text.
        self.prefixed = model.id_to_piece(model.encode("a")[0]).startswith(SPACE)
        self._mark_ids = (
            [self._pieces_bytes.index(bytes([byte])) for byte in SPACE.encode()]
            if self.has_bytes and not self.prefixed
            else []
        )

    def _bytes(self, token: int) -> bytes:
        model = self._model
        if token == self.eos_id or model.is_control(token) or model.is_unknown(token):
            return b""
        piece = model.id_to_piece(token)
        if model.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        batch = self._model.encode(texts, num_threads=-1)
        if self._mark_ids:
            for number, text in enumerate(texts):
                if SPACE in text:
                    batch[number] = self._encode_marks(text)
        return batch

    def _encode_piece(self, text: str, first: bool) -> list[int]:
        if self._mark_ids and SPACE in text:
            return self._encode_marks(text)
        return (self._model if first else self._continuing).encode(text)

    def _encode_marks(self, text: str) -> list[int]:
        # U+2581 in the text would come back as a space: spell it in bytes.
        first, *rest = self._model.encode(text.split(SPACE))
        return first + [token for part in rest for token in self._mark_ids + part]

    @functools.cached_property
    def _continuing(self):
        """The same model without a space before the text."""
        if not self.prefixed:
            return self._model
        return _load(self.content + _NO_DUMMY_PREFIX, "the tokenizer")

    @property
    def only_joins(self) -> bool:
        """Whether the model does nothing but join what stands in its vocabulary: a BPE that changes
        no text before."""
        return self._joined is not None

    @functools.cached_property
    def user_defined(self) -> frozenset[int]:
        """The ids of pieces that are cut out of a text before the others are joined."""
        pieces = (value for number, value in _fields(self.content) if number == _PIECE)
        return frozenset(
            token
            for token, piece in enumerate(pieces)
            if isinstance(piece, bytes) and dict(_fields(piece)).get(_PIECE_TYPE) == _USER_DEFINED
        )

    @functools.cached_property
    def _joined(self) -> frozenset[str] | None:
        """The pairs of characters that a token may hold; None for a model that does more than to
        join what stands in its vocabulary."""
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {_REMOVE_EXTRA_SPACES: 1}
        for number, value in _fields(self.content):
            if number in (_TRAINER, _NORMALIZER) and isinstance(value, bytes):
                (trainer if number == _TRAINER else normalizer).update(_fields(value))
        if (
            # A unigram model adds up scores in float32: what comes before decides near ties.
            trainer.get(_MODEL_TYPE) != _BPE
            or trainer.get(_SPACE_AFTER_WORD)
            or normalizer.get(_CHARACTER_MAP)
            or normalizer[_REMOVE_EXTRA_SPACES]
        ):
            return None
        model = self._model
        return inner_pairs(
            model.id_to_piece(token).replace(SPACE, " ")
            for token in range(self.vocab_size)
            if not (model.is_byte(token) or model.is_control(token) or model.is_unknown(token))
        )

    def _cut(self, text: str, position: int) -> int:
        joined = self._joined
        if joined is None:
            return len(text)
        for cut in range(position, len(text)):
            pair = text[cut - 1 : cut + 1]
            if pair not in joined and SPACE not in pair and self._knows_either(pair):
                return cut
        return len(text)

    def _knows_either(self, pair: str) -> bool:
        """Whether one of two characters is a piece: neighbours that are not become one <unk>."""
        model = self._model
        return self.has_bytes or not all(
            model.is_unknown(model.piece_to_id(character.replace(" ", SPACE))) for character in pair
        )

    def decode(self, ids: list[int]) -> str:
        text = b"".join(self._pieces_bytes[i] for i in ids).decode("utf-8", errors="replace")
        return text[1:] if self.prefixed and text.startswith(" ") else text

    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces_bytes], np.int32)


def _load(content: bytes, where: str):
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(
            "not a SentencePiece model", where, "give the path of a .model file"
        ) from error


def _find_eos(model, where: str, eos: str | None) -> int:
    if eos is None:
        if model.eos_id() < 0:
            raise DataError(
                "the tokenizer has no end-of-document token",
                where,
                "name the piece that ends a document as tokenizer.eos in the recipe",
            )
        return model.eos_id()
    token = model.piece_to_id(eos)
    if model.id_to_piece(token) != eos:
        raise DataError(
            f"no end-of-document token: {eos!r} is not a piece of the tokenizer",
            where,
            "name one that is as tokenizer.eos in the recipe",
        )
    return token


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protocol buffer message, in order: an int of a varint,
    bytes of all else.

    Source: https://protobuf.dev/programming-guides/encoding
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, message[at : at + size]
        at += size
