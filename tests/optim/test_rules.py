"""The table of rules is the only one: the optimizer and the config follow it."""

import pytest
import torch
from torch import nn

from archscale.config.sections import ElementOptimizerConfig, MatrixOptimizerConfig
from archscale.optim import RULES, MatrixOptimizer


@pytest.mark.parametrize("name", RULES)
def test_a_rule_keeps_the_moments_that_it_names(name):
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = MatrixOptimizer([p], lr=0.1, rule=name)
    p.grad = torch.ones(4, 6)
    optimizer.step()
    state = optimizer.state[p]
    per_element = [key for key, value in state.items() if value.shape == p.shape]
    assert all(state[key].all() for key in per_element)  # none is there for nothing
    assert tuple(per_element) == RULES[name].moments
    assert len(per_element) == RULES[name].moment_buffers


def test_the_config_takes_every_rule_for_matrices_and_the_elementwise_for_the_rest():
    def choices(section, key):
        return section.model_json_schema()["properties"][key]["enum"]

    assert choices(MatrixOptimizerConfig, "rule") == list(RULES)
    # On the sphere a norm's or a bias's length could not change.
    assert choices(ElementOptimizerConfig, "kind") == ["adamw", "lion", "sgd", "lamb"]
