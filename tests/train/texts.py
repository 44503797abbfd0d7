"""What a run makes of a prompt."""

from __future__ import annotations

from pathlib import Path

from archscale.inference.sampling import Sampling
from archscale.train.loading import load_text_model
from archscale.train.prompting import Options, continue_prompts


def continued(target: Path, prompt: str, max_tokens: int, temperature: float = 0.0) -> str:
    """A prompt and its continuation."""
    options = Options(max_tokens, Sampling(temperature, top_k=None))
    (result,) = continue_prompts(load_text_model(target), [prompt], options)
    return prompt + result.text
