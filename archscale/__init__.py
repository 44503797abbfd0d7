"""archscale: pre-train language models and find their scaling laws with whole-matrix optimizers."""

__version__ = "0.1.0"
