"""Training a SentencePiece BPE that loses nothing."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from archscale.data.sentencepiece_tokenizer import MODEL_FILE, SPACE, SentencePieceTokenizer
from archscale.errors import DataError

# text per training "sentence": across line ends, so that ":\n" can become a token
_CHUNK_CHARS = 1_000
# SentencePiece 0.2.0 ends the process at a word of 65,536 characters, and every version leaves out
# a sentence of more than these bytes.
_WORD_CHARS = 65_000
_SENTENCE_BYTES = 4_000_000
_TOO_LONG = re.compile(f"[^ ]{{{_WORD_CHARS}}}|.{{{_SENTENCE_BYTES // 4}}}", re.DOTALL)


def _chunks(text: str) -> Iterator[str]:
    chunk = ""
    for line in text.splitlines(keepends=True):
        if chunk and len(chunk) + len(line) > _CHUNK_CHARS:
            yield chunk
            chunk = ""
        chunk += line
    if chunk:
        yield chunk


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for chunk in _chunks(text):
            start = 0
            if len(chunk) >= _WORD_CHARS:
                for part in _TOO_LONG.finditer(chunk):
                    yield chunk[start : part.end()]
                    start = part.end()
            yield chunk[start:]


def _train(texts: list[str], vocab_size: int, eos: str, **changes: Any) -> bytes:
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=_sentences(texts),
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
        eos_piece=eos,
        bos_id=-1,
        pad_id=-1,
        max_sentence_length=_SENTENCE_BYTES,
        minloglevel=2,
        **changes,
    )
    return written.getvalue()


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, out_dir: str | Path, eos: str = "<eos>"
) -> SentencePieceTokenizer:
    """Trains a BPE with byte fallback, and writes it to `out_dir/tokenizer.model`. For every string
    that UTF-8 can hold, decoding gives what was encoded.

    Args:
        texts: documents, all of which are used, in memory: 10 MB hardly change with more.
        vocab_size: pieces, among them 256 bytes, <unk> and the end of a document.
        out_dir: an existing directory.
        eos: how the piece that ends a document is called.

    Raises:
        DataError: too little text for so many pieces, or too small a vocabulary for its characters.
    """
    path = Path(out_dir) / MODEL_FILE
    where, remedy = "tokenizer.train", "change vocab_size, or give the tokenizer more text"
    sample = [text for text in texts if text]
    if not sample:
        raise DataError("no text to train a tokenizer on", where, "check the sources of the recipe")
    try:
        content = _train(sample, vocab_size, eos)
        tokenizer = SentencePieceTokenizer(content, str(path))
        if not tokenizer.has_space:
            # Where spaces are rare, each would be spelled in the bytes of the mark that stands for
            # it, and come back as the mark. SentencePiece up to 0.2.2 ends the process where a
            # required character does not occur.
            content = _train([*sample, " "], vocab_size, eos, required_chars=SPACE)
            tokenizer = SentencePieceTokenizer(content, str(path))
    except RuntimeError as error:
        # without its source location
        reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
        raise DataError(f"cannot train {vocab_size} pieces: {reason}", where, remedy) from error
    path.write_bytes(content)
    return tokenizer
