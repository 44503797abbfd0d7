"""Dense transformer language models."""

from archscale.model.initialize import initialize
from archscale.model.transformer import Transformer

__all__ = ["Transformer", "initialize"]
