"""Whole-matrix optimizers under any sharding: one update rule, usable on its own.

from archscale.optim import MatrixOptimizer, matrix_groups, orthogonalize
"""

from archscale.optim.engine import MatrixOptimizer
from archscale.optim.groups import ParameterGroups, matrix_groups
from archscale.optim.orthogonalize import orthogonalize
from archscale.rules import RULES, Rule

__all__ = ["RULES", "MatrixOptimizer", "ParameterGroups", "Rule", "matrix_groups", "orthogonalize"]
