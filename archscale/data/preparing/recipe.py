"""The recipe: what `archscale data prepare` reads, checked before anything is read or written."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from archscale.data.preparing.sources import SOURCES, Source, fingerprint_files
from archscale.errors import DataError, explain_os_error
from archscale.yaml_reader import parse_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TrainTokenizer(_Strict):
    """Train a SentencePiece BPE on the recipe's own training documents."""

    vocab_size: int = Field(gt=258)
    seed: int = 0


class TokenizerRecipe(_Strict):
    """Either `train`, or the `path` of a trained one (for huggingface: file, directory or hub
    name)."""

    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    path: str | None = None
    train: TrainTokenizer | None = None
    eos: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerRecipe":
        if (self.path is None) == (self.train is None):
            raise ValueError("give either tokenizer.path or tokenizer.train")
        if self.kind == "huggingface" and self.path is None:
            raise ValueError("kind huggingface needs tokenizer.path; only sentencepiece is trained")
        return self


class Recipe(_Strict):
    """What `archscale data prepare` reads."""

    name: str
    sources: list[Source] = Field(min_length=1)
    tokenizer: TokenizerRecipe
    validation: float = Field(default=0.02, gt=0, lt=1)
    deduplicate: bool = True
    output: str

    def origin(self) -> str:
        """sha256 of all that decides the result, as far as it is on this machine."""
        files = [entry for source in self.sources for entry in source.files()]
        given = Path(self.tokenizer.path or "")
        if self.tokenizer.path and given.exists():
            members = sorted(given.glob("*")) if given.is_dir() else [given]
            files += [(path.name, path) for path in members if path.is_file()]
        decides = self.model_dump(mode="json", exclude={"output"})
        return hashlib.sha256(json.dumps([decides, fingerprint_files(files)]).encode()).hexdigest()


def _recipe_error(error: ValidationError, where: str) -> DataError:
    """One line for the first complaint: dotted key, what is wrong, and for an unknown key the
    nearest known one."""
    first = error.errors()[0]
    loc = list(first["loc"])
    parent: Any = Recipe
    if loc[:1] == ["sources"] and len(loc) > 2:
        parent = SOURCES[str(loc.pop(2))]  # the kind, which pydantic puts into the path
    elif loc[:1] == ["tokenizer"] and len(loc) > 1:
        parent = TrainTokenizer if loc[1] == "train" and len(loc) > 2 else TokenizerRecipe
    key = ".".join(map(str, loc))
    message = first["msg"].removeprefix("Value error, ")
    problem = f"{key}: {message}" if key else message
    remedy = "correct the recipe; data_prep/README.md lists the keys"
    if first["type"] in ("extra_forbidden", "union_tag_invalid"):
        unknown_kind = first["type"] == "union_tag_invalid"
        known = list(SOURCES if unknown_kind else parent.model_fields)
        word = str(first["ctx"]["tag"]) if unknown_kind else str(loc[-1])
        problem = (
            f"{key}: unknown kind of source {word!r}" if unknown_kind else f"unknown key {key!r}"
        )
        near = difflib.get_close_matches(word, known, n=1)
        remedy = (f"did you mean {near[0]!r}? " if near else "") + "known here: " + ", ".join(known)
    return DataError(problem, where, remedy)


def _override(recipe: dict, assignment: str) -> None:
    """Sets one dotted key: "tokenizer.train.vocab_size=512", "sources.0.weight=0.5"."""
    key, equals, value = assignment.partition("=")
    node: Any = recipe
    *parents, last = [int(part) if part.isdigit() else part for part in key.strip().split(".")]
    try:
        if not equals:
            raise KeyError(key)
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
        node[last] = parse_yaml(value, f"override {assignment}", DataError)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError("no such override", assignment, "write it as dotted.key=value") from error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; `overrides` are "dotted.key=value" with YAML values. DataError
    names the key."""
    try:
        raw = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path), DataError)
    except OSError as error:
        cause, remedy = explain_os_error(error, "give the path of a recipe YAML")
        raise DataError(f"cannot read the recipe: {cause}", str(path), remedy) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read the recipe: {error}", str(path), "give a recipe YAML in UTF-8"
        ) from error
    if not isinstance(raw, dict):
        raise DataError(
            "a recipe is a mapping of keys", str(path), "data_prep/README.md has an example"
        )
    for assignment in overrides:
        _override(raw, assignment)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise _recipe_error(error, str(path)) from error
