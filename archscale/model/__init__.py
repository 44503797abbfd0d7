"""Transformer language models, dense or with a mixture of experts."""

from archscale.model.initialization import initialize
from archscale.model.transformer import Transformer

__all__ = ["Transformer", "initialize"]
