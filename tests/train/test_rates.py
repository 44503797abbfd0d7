"""Rates of the steps, by hand."""

import pytest

from archscale.checkpoint.changes import Origins
from archscale.config import Config
from archscale.errors import ConfigError
from archscale.train.rates import Rates

STEP = 32  # tokens


def made(**schedule) -> Config:
    return Config.from_dict(
        {
            "name": "t",
            "model": {"depth": 1, "width": 8, "head_dim": 4, "context": 8, "vocab_size": 10},
            "optimizer": {"matrix": {"rule": "muon"}},
            "data": {"train": "d"},
            "training": {"tokens": 12 * STEP, "batch_tokens": STEP},
            "schedule": {"kind": "wsd", "final_ratio": 0.0, "decay_ratio": 0.5, **schedule},
        }
    )


@pytest.mark.parametrize(("share_of", "decays_after"), [("run", 6), ("after_warmup", 7)])
def test_wsd_decays_over_a_share_of_all_tokens_or_of_those_after_the_warm_up(
    share_of, decays_after
):
    """12 steps of which 2 warm up: half of 12, or half of 10, at the end."""
    rates = Rates(made(warmup_tokens=2 * STEP, decay_share_of=share_of), Origins())
    expected = [0, 0.5] + [1] * (decays_after - 1)  # a step's rate is that of the tokens before it
    expected += [(12 - step) / (12 - decays_after) for step in range(decays_after + 1, 12)]
    assert [rates.multiplier(step) for step in range(12)] == pytest.approx(expected)


def test_a_share_that_does_nothing_is_refused():
    with pytest.raises(ConfigError, match="cosine has no decay at the end.*set it to run"):
        made(kind="cosine", decay_share_of="after_warmup")
