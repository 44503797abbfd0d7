"""Which split a document goes to."""

import math
from dataclasses import dataclass
from typing import Self

from archscale.data.preparing.recipe import Recipe
from archscale.errors import DataError


@dataclass
class Spread:
    """What has to be known of all documents before they are divided.

    Attributes:
        documents: their number, duplicates counted.
        lowest, highest: share of any of them.
    """

    documents: int = 0
    lowest: float = 1.0
    highest: float = 0.0

    def add(self, share: float) -> None:
        self.documents += 1
        self.lowest, self.highest = min(self.lowest, share), max(self.highest, share)

    def merge(self, other: Self) -> None:
        self.documents += other.documents
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)


def validation_share(recipe: Recipe, training: Spread, held_out: Spread) -> float:
    """Training documents with a share below this go to validation.

    It is the recipe's own, unless that leaves a split empty: then the document with the lowest or
    the highest share goes over. It is 0 where validation has sources of its own.

    Args:
        training: documents of the recipe's sources.
        held_out: documents of its validation sources.

    Raises:
        DataError: a split is empty all the same.
    """
    if isinstance(recipe.validation, list):
        for split, spread in (("train", training), ("validation", held_out)):
            if spread.documents == 0:
                key = "sources" if split == "train" else "validation"
                raise empty_split(split, f"no document in {key}", recipe.name)
        return 0.0
    if training.documents == 0:
        raise empty_split("train", "no document", recipe.name)
    if training.lowest == training.highest:
        alone = "only one document" if training.documents == 1 else "all documents are equal"
        raise empty_split("validation", alone, recipe.name)
    if training.lowest >= recipe.validation:
        return math.nextafter(training.lowest, 1.0)
    return min(recipe.validation, training.highest)


def empty_split(split: str, reason: str, name: str) -> DataError:
    remedy = "give more and smaller documents, or validation sources"
    return DataError(f"split {split!r} is empty: {reason}", name, remedy)
