"""Roles come from modules; schedules are functions of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from archscale.errors import ConfigError
from archscale.optim.roles import assign_roles, parameter_groups
from archscale.optim.schedule import lr_multiplier
from archscale.rules import Views


class Layer(nn.Module):
    def __init__(self, roles):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.parameter_roles = roles


def test_an_unclaimed_parameter_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"no role to its parameter \(0.weight\)"):
        assign_roles(nn.Sequential(Layer({})))


def test_a_claim_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="'wieght' that does not exist"):
        assign_roles(Layer({"weight": {"role": "matrix"}, "wieght": {"role": "matrix"}}))


def test_an_unknown_role_is_an_error():
    with pytest.raises(ConfigError, match="unknown role 'matrx'"):
        assign_roles(Layer({"weight": {"role": "matrx"}}))


def test_tied_weights_are_claimed_once_by_the_first():
    a, b = Layer({"weight": {"role": "embedding"}}), Layer({"weight": {"role": "head"}})
    b.weight = a.weight
    assert [row.role for row in assign_roles(nn.Sequential(a, b))] == ["embedding"]


def test_groups_hold_every_parameter_once_and_heads_can_be_split():
    model = nn.Sequential(
        Layer({"weight": {"role": "matrix", "blocks": (("q", 2), ("gate", 2))}}),
        Layer({"weight": {"role": "head"}}),
    )
    groups = parameter_groups(
        assign_roles(model), {"matrix": {"lr": 1.0}, "head": {"lr": 2.0}}, views=Views(per_head=1)
    )
    assert [(g["role"], g["lr"], g["params"][0][0]) for g in groups] == [
        ("matrix", 1.0, "0.weight"),
        ("head", 2.0, "1.weight"),
    ]
    assert groups[0]["blocks"] == [[("q0", 1), ("q1", 1), ("gate", 2)]]
    assert groups[1]["blocks"] == [None]


def test_blocks_that_are_one_matrix():
    qkv = [("q", 4), ("k", 2), ("v", 2), ("gate", 2)]
    fused = Views(fused=(("q", "k", "v"), ("gate", "up")))
    assert fused.matrices(qkv) == [("q_k_v", 8), ("gate", 2)]  # a head's gate stays by itself
    assert fused.matrices([("gate", 6), ("up", 6)]) == [("gate_up", 12)]
    assert fused.matrices([]) == []


def test_schedules_by_hand():
    assert lr_multiplier("linear", 0, 100) == 1.0
    assert lr_multiplier("linear", 50, 100, final_ratio=0.1) == pytest.approx(0.55)
    assert lr_multiplier("linear", 60, 120, warmup=20, final_ratio=0.0) == pytest.approx(0.6)
    assert lr_multiplier("cosine", 50, 100, final_ratio=0.0) == pytest.approx(0.5)
    assert lr_multiplier("wsd", 71, 100) == 1.0
    assert lr_multiplier("wsd", 90, 100, final_ratio=0.0, decay_ratio=0.2) == pytest.approx(0.5)
    assert lr_multiplier("constant", 99, 100) == 1.0
    assert lr_multiplier("constant", 5, 100, warmup=10) == 0.5
    with pytest.raises(ValueError, match="linear, cosine, wsd, constant"):
        lr_multiplier("poly", 0, 1)


@given(
    st.sampled_from(["linear", "cosine", "wsd", "constant"]),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_schedules_stay_within_their_bounds(kind, done, warmup, final, decay):
    value = lr_multiplier(
        kind, done * 1000, 1000, warmup=warmup * 1000, final_ratio=final, decay_ratio=decay
    )
    assert 0 <= value <= 1
