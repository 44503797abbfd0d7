"""`matrix_groups`: the parameter groups of any `nn.Module`, every parameter claimed once.

What a parameter is follows from the type of the module that owns it, never from its name or its
number of dimensions alone: a `Linear` weight is a matrix, a `Conv2d` weight is a matrix once its
kernel is flattened, an `Embedding` is a table of vectors. What no type explains is an error that
says how to explain it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from archscale.optim.kinds import KINDS, Kind, known_types
from archscale.optim.roles import ROLES, ParameterRole, clean_name, parameter_groups, whole_shape

HeadArgument = nn.Module | str | Iterable[nn.Module | str] | None
DIMENSIONS = {None: "2 dimensions", "stack": "3 dimensions", "flatten": "3 or more dimensions"}


def matrix_groups(
    model: nn.Module,
    *,
    head: HeadArgument = None,
    kinds: Mapping[type | str, Kind] | None = None,
    matrix: Mapping[str, Any] | None = None,
    element: Mapping[str, Any] | None = None,
) -> ParameterGroups:
    """Parameter groups of `model` for `MatrixOptimizer`; print them to see what was taken as what.

        groups = matrix_groups(model, head=model.lm_head)
        optimizer = MatrixOptimizer(groups, lr=1e-3, rule="orscale_lm", weight_decay=0.1)

    | role | of | rule |
    |---|---|---|
    | matrix | Linear, convolutions, attention (q, k, v apart), recurrent (gates apart) | yours |
    | embedding | Embedding, EmbeddingBag | AdamW |
    | head | what `head` names | AdamW |
    | vector | norms, PReLU, depthwise kernels, all of fewer than 2 dimensions | AdamW |

    Vectors are never decayed. A module's own `parameter_roles` (see `optim.roles`) comes before
    its type, and a subclass counts as its base. A tied weight is an embedding if one of its
    modules is. Frozen parameters stay in their group, where a step without a gradient leaves them
    alone. Integer parameters cannot be trained and are left out.

    Convolutions are matrices (out, in · kernel), one for each of their `groups`. A depthwise
    kernel has one input channel, so it is no matrix between channels: a vector, without decay as
    MobileNet trains it. The weights of `ConvTranspose` and of transformers' `Conv1D` store the
    transposed matrix; the optimizer swaps fan-in and fan-out for them (`transposed`), and q, k, v
    fused in a `Conv1D` are one matrix. A `Bilinear` weight is the matrix (out, in1 · in2).

    Args:
        head: the output head, a module of `model`, its name, or several. All weights in it are
            updated elementwise, as every recipe for Muon does. No type tells a head from another
            `Linear`: without this argument a head is what transformers' models return from
            `get_output_embeddings()`, what `parameter_roles` declares, or an
            `AdaptiveLogSoftmaxWithLoss`; a lone `Linear` of an embedding's shape is refused.
            `head=()` says that there is none.
        kinds: what the weights (2 or more dimensions) of other modules are, by module type or by
            a parameter's full name: "matrix", "stack" for (E, fan_out, fan_in), "flatten" for
            (fan_out, ...), "embedding", "head", "vector"; or a dict as in `parameter_roles`, such
            as `{"role": "matrix", "blocks": [("q", 512), ("k", 128), ("v", 128)]}`. The most
            specific type decides, a name before any type.
        matrix: more keys for the matrix groups, such as `lr` or `rule`.
        element: the same for all others, such as `{"lr": 3e-4}`; a `weight_decay` in it reaches
            embeddings and heads. The groups are plain dicts and can be edited further.

    Raises:
        ValueError: naming the parameter and the remedy.
    """
    claims = _Claims(dict(kinds or {}), _head_parameters(model, head))
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for key in getattr(module, "parameter_roles", {}).keys() - own.keys():
            raise ValueError(
                f"{prefix or 'the model'}: parameter_roles names {key!r}, which is no parameter of"
                f" this {type(module).__name__}: correct the name, or take it out"
            )
        for key, parameter in own.items():
            claims.add(clean_name(f"{prefix}.{key}" if prefix else key), key, module, parameter)
    claims.check(ask_for_head=head is None)
    others = {"rule": "adamw", **(element or {})}
    options = {
        "matrix": dict(matrix or {}),
        "embedding": others,
        "head": others,
        "vector": {**others, "weight_decay": 0.0},
    }
    rows = [claim.row for claim in claims.by_id.values()]
    types = {claim.row.name: claim.type_name for claim in claims.by_id.values()}
    blocks = {row.name: [block for block, _ in row.blocks] for row in rows}
    groups = parameter_groups(rows, options)
    return ParameterGroups(groups, types, blocks, claims.left_out, claims.tied)


class ParameterGroups(list):
    """A list of parameter groups whose `repr` is a table of what was taken as what.

    Attributes:
        types: module type by parameter name.
        blocks: names of the matrices in a fused parameter, by parameter name.
        left_out: names of integer parameters, which are in no group.
        tied: names of head weights that follow an embedding.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]] = (),
        types: Mapping[str, str] | None = None,
        blocks: Mapping[str, list[str]] | None = None,
        left_out: Sequence[str] = (),
        tied: Sequence[str] = (),
    ):
        super().__init__(groups)
        self.types, self.blocks = dict(types or {}), dict(blocks or {})
        self.left_out, self.tied = list(left_out), list(tied)

    def __repr__(self) -> str:
        heads = [name for group in self if group["role"] == "head" for name, _ in group["params"]]
        heads += [f"{name} (tied: follows the embedding)" for name in self.tied]
        lines: dict[tuple[str, ...], list[tuple[str, int]]] = {}  # equal layers share a line
        for group in self:
            for name, p in group["params"]:
                shape = whole_shape(p)
                row = (
                    group["role"],
                    str(getattr(group.get("rule"), "name", group.get("rule", "the optimizer's"))),
                    _view_text(group, shape, self.blocks.get(name, [])),
                    " x ".join(map(str, shape)) or "scalar",
                    self.types.get(name, "-"),
                    "" if p.requires_grad else " (frozen)",
                    re.sub(r"(?<![^.])\d+(?![^.])", "*", name),
                )
                lines.setdefault(row, []).append((name, math.prod(shape)))
        table = [("role", "rule", "taken as", "shape", "module", "elements", "parameter")]
        for (*cells, frozen, pattern), members in lines.items():
            name = f"{pattern} ({len(members)})" if len(members) > 1 else members[0][0]
            elements = sum(count for _, count in members)
            table.append((*cells, f"{elements:,}", name + frozen))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*table)]
        count = sum(len(members) for members in lines.values())
        total = sum(elements for members in lines.values() for _, elements in members)
        text = [f"{count} parameters, {total:,} elements; head: {', '.join(heads) or 'none'}"]
        text += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        text += [f"left out, not floating-point: {', '.join(self.left_out)}"] * bool(self.left_out)
        return "\n".join(text)


def _view_text(group: Mapping[str, Any], shape: Sequence[int], blocks: Sequence[str]) -> str:
    if group["role"] != "matrix":
        return "elements"
    rest = shape[1:] if group.get("view") == "stack" else shape
    text = f"{rest[0]} x {math.prod(rest[1:])}" + " transposed" * bool(group.get("transposed"))
    if group.get("view") == "stack":
        text = f"{shape[0]} of {text}"
    if blocks:
        text += ": " + (", ".join(blocks) if len(blocks) < 5 else f"{len(blocks)} blocks")
    return text


# --- claims


@dataclass(frozen=True)
class _Claim:
    row: ParameterRole
    owner: nn.Module
    priority: int  # of two claims on a tied weight the lower one stands

    @property
    def type_name(self) -> str:
        return _own_type(self.owner).__name__


def _own_type(module: nn.Module) -> type:
    """The module's type as its author wrote it: FSDP2 puts a subclass of its own before it."""
    mro = type(module).__mro__
    return next(cls for cls in mro if not cls.__module__.startswith("torch.distributed."))


class _Claims:
    def __init__(self, kinds: dict[type | str, Kind], heads: dict[int, str]):
        self.by_id: dict[int, _Claim] = {}
        self.left_out: list[str] = []
        self.tied: list[str] = []
        self._kinds, self._heads, self._known = kinds, heads, known_types()
        self._unused = set(kinds)
        self._unknown: dict[int, tuple[str, nn.Module, tuple[int, ...]]] = {}

    def add(self, name: str, key: str, module: nn.Module, parameter: nn.Parameter) -> None:
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run a batch through the model")
        if not (parameter.is_floating_point() or parameter.is_complex()):
            self.left_out += [name] * (name not in self.left_out)
            return
        shape = whole_shape(parameter)
        kind = self._kind(name, key, module, len(shape))
        if id(parameter) in self._heads and name not in self._kinds and _role(kind) != "embedding":
            kind = "head"
        if kind is None:
            self._unknown.setdefault(id(parameter), (name, module, shape))
            return
        row = _row(name, kind, parameter, shape)
        priority = {"embedding": 1, "head": 2}.get(row.role, 3) if name not in self._kinds else 0
        before = self.by_id.get(id(parameter))
        if before is None or priority < before.priority:
            row = replace(row, name=before.row.name if before else name)
            self.by_id[id(parameter)] = _Claim(row, module, priority)

    def _kind(self, name: str, key: str, module: nn.Module, dimensions: int) -> Kind | None:
        self._unused.discard(name)
        if dimensions > 1:
            self._unused -= set(type(module).__mro__)
        if name in self._kinds:
            return self._kinds[name]
        declared: Mapping[str, Kind] = getattr(module, "parameter_roles", {})
        if key in declared:
            return declared[key]
        if dimensions < 2:
            return "vector"
        for cls in type(module).__mro__:
            if cls in self._kinds:
                return self._kinds[cls]
            if cls in self._known:
                return self._known[cls](module, key)
        return None

    def check(self, ask_for_head: bool) -> None:
        """Raise for kinds that match nothing, for what nobody claims, and for a likely head."""
        for key in self._unused:
            label = f"type {key.__name__}" if isinstance(key, type) else f"parameter {key!r}"
            raise ValueError(
                f"kinds: no weight of the model has {label}: take it out, or give a full name as "
                "named_parameters() has it or the type of the module that owns the weight"
            )
        unknown = [entry for number, entry in self._unknown.items() if number not in self.by_id]
        if unknown:
            raise ValueError(_unknown_text(unknown))
        rows = [claim.row for claim in self.by_id.values()]
        self.tied = [
            self._heads[id(row.parameter)]
            for row in rows
            if row.role == "embedding" and id(row.parameter) in self._heads
        ]
        if ask_for_head and not self.tied and all(row.role != "head" for row in rows):
            self._refuse_likely_head()

    def _refuse_likely_head(self) -> None:
        tables = {c.row.shape: c.row.name for c in self.by_id.values() if c.row.role == "embedding"}
        alike: dict[tuple[int, ...], list[str]] = {}
        for claim in self.by_id.values():
            if claim.row.role == "matrix" and isinstance(claim.owner, nn.Linear):
                alike.setdefault(claim.row.shape, []).append(claim.row.name)
        for shape, names in alike.items():
            if shape in tables and len(names) == 1:
                module = names[0].rpartition(".")[0]
                raise ValueError(
                    f"parameter {names[0]!r} has the shape of the embedding {tables[shape]!r}, as "
                    "an output head has, and nothing says that it is one: pass matrix_groups(..., "
                    f"head={module!r}), or head=() if it is a matrix like the others"
                )


def _role(kind: Kind | None) -> Any:
    return KINDS.get(kind, {}).get("role") if isinstance(kind, str) else (kind or {}).get("role")


def _row(name: str, kind: Kind, parameter: nn.Parameter, shape: tuple[int, ...]) -> ParameterRole:
    """The claim `kind` on one parameter, or ValueError where its shape does not allow it."""
    if isinstance(kind, str) and kind not in KINDS:
        choices = ", ".join(KINDS)
        raise ValueError(f"parameter {name!r}: unknown kind {kind!r}: use one of {choices}")
    spec = KINDS[kind] if isinstance(kind, str) else kind
    role, view = _role(kind), spec.get("view")
    blocks = tuple((str(block), int(rows)) for block, rows in spec.get("blocks") or ())
    if role not in ROLES:
        choices = ", ".join(ROLES)
        raise ValueError(f"parameter {name!r}: unknown role {role!r}: use one of {choices}")
    if role != "matrix":
        return ParameterRole(name, role, shape, (), parameter)
    if view not in DIMENSIONS:
        raise ValueError(f"parameter {name!r}: unknown view {view!r}: use 'stack' or 'flatten'")
    fits = {None: len(shape) == 2, "stack": len(shape) == 3, "flatten": len(shape) > 2}[view]
    if not fits:
        raise ValueError(
            f"parameter {name!r} of shape {shape}: a matrix with view {view!r} has "
            f"{DIMENSIONS[view]}: 'matrix' is (m, n), 'stack' (E, m, n), 'flatten' (m, ...)"
        )
    rows = shape[1] if view == "stack" else shape[0]
    if blocks and sum(size for _, size in blocks) != rows:
        raise ValueError(
            f"parameter {name!r}: blocks {list(blocks)} do not sum to its {rows} rows: give "
            "(name, rows) of every matrix in it, in storage order"
        )
    return ParameterRole(name, role, shape, blocks, parameter, view, bool(spec.get("transposed")))


def _unknown_text(unknown: Sequence[tuple[str, nn.Module, tuple[int, ...]]]) -> str:
    first, module, shape = unknown[0]
    types = ", ".join(dict.fromkeys(f"{_own_type(owner).__name__}: ..." for _, owner, _ in unknown))
    rest = f" (and {len(unknown) - 1} more parameters)" if len(unknown) > 1 else ""
    return (
        f"parameter {first!r} of shape {shape} belongs to a {_own_type(module).__name__}, a module "
        f"of unknown kind{rest}: say what it is with matrix_groups(model, kinds={{{types}}}), each "
        "'matrix' (m, n), 'stack' (E, m, n), 'flatten' (m, ...) or, for elementwise updates, "
        "'embedding', 'head' or 'vector'; a parameter's full name as a key tells of it alone"
    )


# --- heads


def _head_parameters(model: nn.Module, head: HeadArgument) -> dict[int, str]:
    """Name by id of every weight (2 or more dimensions) of the output head."""
    if head is None:
        modules = list(_declared_heads(model))
    else:
        chosen = [head] if isinstance(head, nn.Module | str) else list(head)
        modules = [_module(model, choice) for choice in chosen]
    names = {id(p): clean_name(name) for name, p in model.named_parameters(remove_duplicate=False)}
    weights = [p for module in modules for p in module.parameters() if len(whole_shape(p)) > 1]
    return {id(p): names[id(p)] for p in weights}


def _declared_heads(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            yield module
        output = getattr(module, "get_output_embeddings", None)  # of transformers' models
        embeddings = output() if callable(output) else None
        if isinstance(embeddings, nn.Module):
            yield embeddings


def _module(model: nn.Module, choice: nn.Module | str) -> nn.Module:
    for name, module in model.named_modules(remove_duplicate=False):
        if module is choice or clean_name(f"{name}.")[:-1] == choice:
            return module
    given = repr(choice) if isinstance(choice, str) else f"this {type(choice).__name__}"
    raise ValueError(
        f"head: {given} is no module of the model: give one of its modules or its name"
    )
