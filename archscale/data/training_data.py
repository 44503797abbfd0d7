"""What training reads: one data set, or several mixed by weight, behind one object.

A window's position in the run is its global sample number. `data.train` alone is the mixture of one
source; its order is that of `sampler` under the run's own seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Self

import numpy as np

from archscale.config.sections import DataConfig
from archscale.data.mixture import Order, quotas
from archscale.data.packed import PackedSplit, open_packing
from archscale.data.packing_index import PackedSize
from archscale.data.sampler import WindowOrder
from archscale.data.split import TokenSplit
from archscale.data.stored import DataFacts, StoredSplit
from archscale.data.windows import Concatenated, WindowReader, Windows
from archscale.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        name: in the mixture; empty for `data.train`.
        path: its directory.
        part: its samples in a period of the mixture.
    """

    name: str
    path: str
    part: int

    @property
    def owner(self) -> str:
        """For people."""
        return f"source {self.name} of data.mixture" if self.name else "data.train"


class Vocabulary(NamedTuple):
    """What the token ids of a data set stand for.

    Attributes:
        owner: the data set, for people.
        path: its directory.
        fingerprint: of its tokenizer; empty where that is not known, as of shards made elsewhere.
        size: of the vocabulary; None where no more is known than that ids fit into the model's.
        eos_id: the token after every document; None where that is not known.
    """

    owner: str
    path: str
    fingerprint: str
    size: int | None
    eos_id: int | None = None

    @classmethod
    def of(
        cls,
        owner: str,
        path: str,
        data: TokenSplit | StoredSplit | DataFacts,
        model_size: int | None,
    ) -> Self:
        """That of a split or data set that was opened for a model of this vocabulary, whose
        padding counts."""
        known = bool(data.fingerprint) or data.vocab_size != model_size
        size = data.vocab_size if known else None
        return cls(owner, path, data.fingerprint, size, data.eos_id)

    def check_same(self, other: Vocabulary) -> None:
        """Refuses, by a ConfigError that names both, ids that mean different texts. Where a
        tokenizer is not known, vocabularies must at least have the same size, if that is known."""
        same = all(
            not mine or not theirs or mine == theirs
            for mine, theirs in (
                (self.fingerprint, other.fingerprint),
                (self.size, other.size),
            )
        )
        if not same:
            raise ConfigError(
                f"{self.owner} was made with another tokenizer than {other.owner}",
                self.path,
                f"prepare both with one tokenizer, such as the one in {other.path}",
            )


def shared_vocabulary(vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    """That of all data sets, of a known tokenizer if there is one, or else of a known size.

    Raises:
        ConfigError: they do not share one.
    """
    shared = max(vocabularies, key=lambda each: (bool(each.fingerprint), each.size is not None))
    for vocabulary in vocabularies:
        vocabulary.check_same(shared)
    return shared


def training_sources(data: DataConfig) -> list[Source]:
    """What training reads, sorted by name, so that the order in the YAML does not matter.

    Raises:
        ConfigError: a weight that is too small to count.
    """
    if data.mixture is None:
        assert data.train is not None, "the config has one of the two"
        return [Source("", data.train, 1)]
    parts = quotas({entry.name: entry.weight for entry in data.mixture})
    paths = {entry.name: entry.path for entry in data.mixture}
    return [Source(name, paths[name], part) for name, part in parts.items()]


def source_seed(seed: int, name: str) -> int:
    """The seed of the order within a source: a data set that stands twice has two orders. That of
    `data.train` is the run's own."""
    if not name:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")


class TrainingData:
    """The windows of all sources, in the order of the global sample number.

    Args:
        sources: what to read, sorted by name.
        splits: the training split of each.
        seed: of the run.
        readers: the windows of each split; by default those that it is cut into as it stands.
        vocab_size: of the model that the splits were opened for.

    Attributes:
        context: positions of a window.
        vocabulary: that all sources share.
        vocab_size: ids are below it.
        eos_id: its end of a document; None where a source does not say.
        num_tokens: of all sources together.
        shares: of the samples, by name of the source.
        readers: the windows of each source.

    Raises:
        ConfigError: sources of different tokenizers, or ends of documents.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        splits: Sequence[TokenSplit],
        seed: int,
        readers: Sequence[WindowReader] | None = None,
        vocab_size: int | None = None,
    ):
        self.vocabulary = shared_vocabulary(
            [
                Vocabulary.of(source.owner, str(split.path), split, vocab_size)
                for source, split in zip(sources, splits, strict=True)
            ]
        )
        self.sources, self.splits = list(sources), list(splits)
        self.readers: list[WindowReader]
        self.readers = list(readers or map(Concatenated, splits))
        self.context = splits[0].context
        self.vocab_size = self.vocabulary.size or splits[0].vocab_size
        self.eos_id = self._end_of_document()
        self.num_tokens = sum(split.num_tokens for split in splits)
        period = sum(source.part for source in sources)
        self.shares = {source.name: Fraction(source.part, period) for source in sources}
        self._order = Order({source.name: source.part for source in sources})
        self._windows = [
            WindowOrder(source_seed(seed, source.name), reader.num_samples)
            for source, reader in zip(sources, self.readers)
        ]

    @property
    def packed(self) -> list[PackedSize] | None:
        """How full the windows of each source are, where documents are packed."""
        readers = [reader for reader in self.readers if isinstance(reader, PackedSplit)]
        return [reader.size for reader in readers] or None

    @property
    def files(self) -> list[str]:
        """Names of the files that are trained on."""
        return [file for split in self.splits for file in split.files]

    @property
    def mixed(self) -> bool:
        """Whether the sources have names, even if there is only one; `data.train` has none."""
        return bool(self.sources[0].name)

    def _end_of_document(self) -> int | None:
        ends = {split.eos_id: source.name for source, split in zip(self.sources, self.splits)}
        known = [end for end in ends if end is not None]
        if len(known) > 1:
            first, second = known[:2]
            raise ConfigError(
                f"documents end with token {first} in source {ends[first]}, with {second} in"
                f" source {ends[second]}",
                "data.mixture",
                "prepare both with one tokenizer and the same `tokenizer.eos`",
            )
        return known[0] if len(ends) == 1 and known else None

    def windows(self, numbers: np.ndarray) -> Windows:
        """The windows of global sample numbers [n].

        Raises:
            DataError: a shard cannot be read, or has an id outside the vocabulary.
        """
        places, own = self._order.at(numbers)
        parts, order = [], []
        for place in np.unique(places):
            rows = np.flatnonzero(places == place)
            parts.append(self.readers[place].windows(self._windows[place].at(own[rows])))
            order.append(rows)
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(np.concatenate(order))
        inputs, targets, documents = zip(*parts)
        return Windows(
            np.concatenate(inputs)[back],
            np.concatenate(targets)[back],
            None if documents[0] is None else np.concatenate(documents)[back],
        )

    def check(self) -> None:
        """Everything that can be known of all sources before step 1; DataError names the first bad
        file."""
        for split in self.splits:
            split.check(self.vocab_size)


def open_training_data(
    data: DataConfig, context: int, seed: int, vocab_size: int | None = None
) -> TrainingData:
    """The training data of a config, in windows of `context` tokens.

    Args:
        vocab_size: of the model, for files that do not say theirs.

    Raises:
        ConfigError: sources that cannot be mixed, or documents to pack whose ends are unknown.
        DataError: one of them is missing or too short, or how it is packed cannot be written.
    """
    chosen = training_sources(data)
    splits = [
        TokenSplit(source.path, "train", context, data.tokenizer, vocab_size) for source in chosen
    ]
    readers = None
    if data.packing == "best_fit":
        readers = [
            PackedSplit(
                split, open_packing(data, split.path, context, vocab_size), data.document_mask
            )
            for split in splits
        ]
    return TrainingData(chosen, splits, seed, readers, vocab_size)
