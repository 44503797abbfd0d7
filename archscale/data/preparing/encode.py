"""Units encoded: token ids and a table of documents, from which all that depends on several
documents is decided later.

Of a unit there are, in this order:

    KEY.tokens       ids of its documents, each with the end of a document after it
    KEY.table.npy    a row of TABLE for each document
    KEY.json         counts; with this file the unit is done
"""

import functools
import json
import os
import struct
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from archscale.data.preparing.arrays import write_array
from archscale.data.preparing.division import Spread
from archscale.data.preparing.documents import Document, RecipeUnit, UnitJob
from archscale.data.preparing.fidelity import Fidelity
from archscale.data.preparing.jobs import Report
from archscale.data.preparing.preparation import Preparation
from archscale.data.preparing.trouble import Trouble
from archscale.data.shards import TokenizerEntry, token_dtype
from archscale.data.tokenizer import Tokenizer, recorded_tokenizer
from archscale.errors import DataError
from archscale.files import write_atomically

# Identity of the document in two halves; its share, which decides the split; tokens, the end of the
# document among them; UTF-8 bytes of text.
TABLE = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("share", "<f8"), ("tokens", "<u8"), ("bytes", "<u8")]
)
_ROW = struct.Struct("<QQdQQ")
_REPORT_BYTES = 1_000_000  # of text between two reports of progress


@dataclass(frozen=True)
class EncodedUnit:
    """A unit that is done. `stem` is the path of its files without their endings."""

    unit: RecipeUnit
    stem: Path
    documents: int
    spread: Spread
    dropped: Counter
    trouble: Trouble
    fidelity: Fidelity

    @property
    def tokens_file(self) -> Path:
        return tokens_file(self.stem)

    def table(self) -> np.ndarray:
        """TABLE rows [documents]."""
        return read_table(self.stem)


def tokens_file(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.tokens")


def read_table(stem: Path) -> np.ndarray:
    """TABLE rows [documents] of an encoded unit."""
    return np.load(stem.with_name(f"{stem.name}.table.npy"))


@functools.lru_cache(maxsize=1)
def _load(kind: str, file: str, fingerprint: str, vocab_size: int, eos_id: int) -> Tokenizer:
    """Loaded once in each process."""
    entry = TokenizerEntry(
        kind=kind, file=file, fingerprint=fingerprint, vocab_size=vocab_size, eos_id=eos_id
    )
    return recorded_tokenizer(entry, Path(file), "give the same command again")


@dataclass(frozen=True)
class EncodeUnit(UnitJob):
    """A job: one unit to tokens."""

    tokenizer: TokenizerEntry
    stem: Path

    @property
    def result(self) -> Path:
        return self.stem.with_name(f"{self.stem.name}.json")

    def run(self, report: Report) -> None:
        tokenizer = _load(**self.tokenizer.model_dump())
        dropped, trouble, fidelity = Counter[str](), Trouble(self.unit.on_error), Fidelity()
        spread, table, unreported = Spread(), bytearray(), 0
        with _new_file(tokens_file(self.stem)) as file:
            for document in self.unit.documents(trouble, dropped):
                tokens = _encode(document, tokenizer, file, fidelity)
                identity = (int.from_bytes(half) for half in _halves(document.identity))
                table += _ROW.pack(*identity, document.share, tokens, document.size)
                spread.add(document.share)
                unreported += document.size
                del document  # before the next one is read
                if unreported >= _REPORT_BYTES:
                    report(unreported)
                    unreported = 0
        with _new_file(self.stem.with_name(f"{self.stem.name}.table.npy")) as file:
            write_array(file, np.frombuffer(table, TABLE))
        report(unreported)
        record = {
            "spread": asdict(spread),
            "dropped": dict(dropped),
            "trouble": trouble.to_json(),
            "fidelity": fidelity.to_json(),
        }
        write_atomically(self.result, json.dumps(record))

    def read(self) -> EncodedUnit:
        """What the job left."""
        record = json.loads(self.result.read_bytes())
        spread = Spread(**record["spread"])
        return EncodedUnit(
            unit=self.unit,
            stem=self.stem,
            documents=spread.documents,
            spread=spread,
            dropped=Counter(record["dropped"]),
            trouble=Trouble.from_json(record["trouble"]),
            fidelity=Fidelity.from_json(record["fidelity"]),
        )


def _halves(identity: bytes) -> tuple[bytes, bytes]:
    return identity[:8], identity[8:]


def _encode(document: Document, tokenizer: Tokenizer, file: BinaryIO, fidelity: Fidelity) -> int:
    """Writes a document's ids and the end of the document; how many they are."""
    ids = tokenizer.encode_document(document.text)
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise DataError(
            f"token id {ids.max()} is outside the vocabulary of {tokenizer.vocab_size}",
            "tokenizer",
            "the tokenizer and its declared vocab_size do not belong together",
        )
    fidelity.add(document.text, document.size, ids, tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    file.write(ids.astype(dtype).data)
    file.write(np.array([tokenizer.eos_id], dtype).data)
    return len(ids) + 1


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is complete and on disk."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def encode_jobs(preparation: Preparation, tokenizer: TokenizerEntry) -> list[EncodeUnit]:
    """A job for each unit."""
    folder = preparation.work.folder("units")
    decides = [tokenizer.fingerprint, tokenizer.eos_id]
    return [
        EncodeUnit(unit, tokenizer, folder / unit.key("tokens", *decides))
        for unit in preparation.units
    ]
