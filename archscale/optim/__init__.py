"""Whole-matrix optimizers under any sharding: one update rule, usable on its own.

from archscale.optim import MatrixOptimizer, orthogonalize
"""

from archscale.optim.engine import MatrixOptimizer
from archscale.optim.orthogonalize import orthogonalize
from archscale.optim.rules import RULES, Rule

__all__ = ["RULES", "MatrixOptimizer", "Rule", "orthogonalize"]
