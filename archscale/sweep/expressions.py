"""Expressions in grids: arithmetic and comparisons over dotted config keys, read through `ast`,
never run as Python.

    Expression("20 * model.width ** 2", "derive", keys)(lambda key: 64)          # 81920
    Expression("model.depth < 8 or model.width in [64, 128]", "where", keys)

Allowed: numbers, text in quotes, true, false, null, lists, + - * / // % **, comparisons, in, and,
or, not, `a if b else c`.
"""

from __future__ import annotations

import ast
import contextlib
import operator
from collections.abc import Callable, Collection
from typing import Any

from archscale.errors import ConfigError, nearest, show

LONGEST = 1000  # characters
HIGHEST_POWER = 64  # 9 ** 9 ** 9 would take all memory

CONSTANTS = {"true": True, "false": False, "null": None}
ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
SIGNS: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
ALLOWED = "use arithmetic, comparisons, and, or, not, in, a if b else c over config keys"


class Expression:
    """One expression; `names` are the keys in it.

    Args:
        text: of the expression.
        where: what errors name.
        keys: all that may be named.

    Raises:
        ConfigError: it cannot be read, has something in it that is not allowed, or an unknown key.
    """

    def __init__(self, text: str, where: str, keys: Collection[str]):
        self.text, self.where = text, where
        self.names: set[str] = set()
        if len(text) > LONGEST:
            raise ConfigError(
                f"an expression of {len(text)} characters", where, f"use at most {LONGEST}"
            )
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ConfigError(f"{show(text)} is not an expression", where, ALLOWED) from None
        self._check(self._tree, keys)

    def __call__(self, value: Callable[[str], Any]) -> Any:
        """Its value, where `value` gives that of a key.

        Raises:
            ConfigError: it has none, such as a division by zero.
        """
        try:
            result = self._evaluate(self._tree, value)
        except (ArithmeticError, TypeError, ValueError) as error:
            named = ", ".join(f"{name} {show(value(name))}" for name in sorted(self.names))
            what = f"{show(self.text)} has no value{' with ' if named else ''}{named}: {error}"
            raise ConfigError(
                what, self.where, "correct it, or drop these runs with `where`"
            ) from None
        return result

    def _check(self, node: ast.AST, keys: Collection[str]) -> None:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return
            case ast.Name() | ast.Attribute():
                name = _dotted(node)
                if name is None:
                    self._refuse(node)
                elif name not in CONSTANTS:
                    if name not in keys:
                        close = nearest(name, sorted(keys))
                        remedy = (
                            f"did you mean {close}?"
                            if close
                            else "name dotted keys of the config; put text in quotes"
                        )
                        raise ConfigError(
                            f"unknown key {show(name)} in {show(self.text)}", self.where, remedy
                        )
                    self.names.add(name)
                return
            case ast.BinOp(op=op) if type(op) in ARITHMETIC:
                pass
            case ast.UnaryOp(op=op) if type(op) in SIGNS:
                pass
            case ast.Compare(ops=ops) if all(type(op) in COMPARISONS for op in ops):
                pass
            case ast.BoolOp() | ast.IfExp() | ast.List() | ast.Tuple():
                pass
            case _:
                self._refuse(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._check(child, keys)

    def _refuse(self, node: ast.AST) -> None:
        text = show(ast.unparse(node)) if isinstance(node, ast.expr) else type(node).__name__
        raise ConfigError(f"{text} is not allowed in {show(self.text)}", self.where, ALLOWED)

    def _evaluate(self, node: ast.AST, value: Callable[[str], Any]) -> Any:
        match node:
            case ast.Constant(value=constant):
                return constant
            case ast.Name() | ast.Attribute():
                name = _dotted(node)
                assert name is not None
                return CONSTANTS[name] if name in CONSTANTS else as_number(value(name))
            case ast.BinOp():
                return self._arithmetic(node, value)
            case ast.UnaryOp(op=op, operand=operand):
                inner = self._evaluate(operand, value)
                return SIGNS[type(op)](inner if isinstance(op, ast.Not) else _number(inner))
            case ast.BoolOp():
                return self._and_or(node, value)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._evaluate(body if self._evaluate(test, value) else orelse, value)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [self._evaluate(element, value) for element in elements]
            case ast.Compare():
                return self._comparison(node, value)
        raise AssertionError(f"{node} was checked")

    def _arithmetic(self, node: ast.BinOp, value: Callable[[str], Any]) -> Any:
        left, right = (_number(self._evaluate(side, value)) for side in (node.left, node.right))
        if isinstance(node.op, ast.Pow) and abs(right) > HIGHEST_POWER:
            raise ValueError(f"the power {right} is too high")
        return _number(ARITHMETIC[type(node.op)](left, right))

    def _and_or(self, node: ast.BoolOp, value: Callable[[str], Any]) -> Any:
        """As Python: the part that decides, no part behind it is looked at."""
        part = None
        for operand in node.values:
            part = self._evaluate(operand, value)
            if bool(part) == isinstance(node.op, ast.Or):
                break
        return part

    def _comparison(self, node: ast.Compare, value: Callable[[str], Any]) -> bool:
        """As Python: a < b < c compares each with its neighbour."""
        left = self._evaluate(node.left, value)
        for comparison, comparator in zip(node.ops, node.comparators):
            right = self._evaluate(comparator, value)
            if not COMPARISONS[type(comparison)](left, right):
                return False
            left = right
        return True


def as_number(value: Any) -> Any:
    """Text that is a number as that number, as the config reads it (YAML 1.1 takes 1e6 for text);
    all else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value) if set(value) & set(".eE") else int(value)
    return value


def _dotted(node: ast.AST) -> str | None:
    """`a.b.c` of names and attributes, None of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)) is not None:
        return f"{before}.{node.attr}"
    return None


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{show(value)} is not a number")
    return value
