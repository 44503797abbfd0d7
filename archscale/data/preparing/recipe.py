"""The recipe: what `archscale data prepare` reads, checked before anything is read or written."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from archscale.data.preparing.sample import SAMPLE_BYTES
from archscale.data.preparing.sources import SOURCES, Source
from archscale.errors import DataError, explain_os_error
from archscale.yaml_reader import parse_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @field_validator("*")
    @classmethod
    def _can_be_stored(cls, value: Any) -> Any:
        """The recipe is kept with the data set, as JSON, and names files."""
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("not Unicode text, or with a NUL in it")
        return value


class TrainTokenizer(_Strict):
    """Train a SentencePiece BPE on the recipe's own training documents."""

    vocab_size: int = Field(gt=258, le=SAMPLE_BYTES)
    seed: int = 0


class TokenizerRecipe(_Strict):
    """Either `train`, or the `path` of a trained one (for huggingface: file, directory or hub
    name)."""

    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    path: str | None = Field(default=None, min_length=1)
    train: TrainTokenizer | None = None
    eos: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerRecipe":
        if (self.path is None) == (self.train is None):
            raise ValueError("give either tokenizer.path or tokenizer.train")
        if self.kind == "huggingface" and self.path is None:
            raise ValueError("kind huggingface needs tokenizer.path; only sentencepiece is trained")
        return self


def _form(value: Any) -> str:
    return "sources" if isinstance(value, list) else "share"


class Recipe(_Strict):
    """What `archscale data prepare` reads.

    Attributes:
        validation: share of the documents, by content hash; or sources of its own.
        on_error: what to do about documents and files that cannot be read.
        lossy: accept a tokenizer that loses text.
    """

    name: str
    sources: list[Source] = Field(min_length=1)
    tokenizer: TokenizerRecipe
    validation: Annotated[
        Annotated[float, Field(gt=0, lt=1), Tag("share")]
        | Annotated[list[Source], Field(min_length=1), Tag("sources")],
        Discriminator(_form),
    ] = 0.02
    deduplicate: bool = True
    on_error: Literal["stop", "skip"] = "stop"
    lossy: bool = False
    output: str

    def all_sources(self) -> list[Source]:
        """Those of validation too."""
        held_out = self.validation if isinstance(self.validation, list) else []
        return [*held_out, *self.sources]

    def decides(self) -> dict[str, Any]:
        """The keys that decide the content of the data set."""
        return self.model_dump(mode="json", exclude={"output", "lossy"})

    def makes_the_same_as(self, recorded: dict[str, Any]) -> bool:
        """Whether a recipe, as a manifest has it, has the same content in all keys that matter."""
        try:
            return Recipe.model_validate(recorded).decides() == self.decides()
        except ValidationError:
            return False


def _recipe_error(error: ValidationError, where: str) -> DataError:
    """One line for the first complaint: dotted key, what is wrong, and for an unknown key the
    nearest known one."""
    first = error.errors()[0]
    loc = list(first["loc"])
    parent: Any = Recipe
    if loc[:1] == ["validation"] and len(loc) > 1:
        loc.pop(1)  # the form, which pydantic puts into the path
    if loc[:1] in (["sources"], ["validation"]) and len(loc) > 2:
        parent = SOURCES[str(loc.pop(2))]  # the kind, likewise
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
