"""`archscale bench checkpoint` measures every saver, and one that fails costs its own row only."""

import pytest
import torch

from archscale.bench import checkpoint
from archscale.bench.checkpoint import ARMS, measure, sized_state


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.label != "dcp.async_save"])
def test_every_saver_is_measured_and_brings_back_what_it_saved(tmp_path, monkeypatch, arm):
    """All but the one that would start a process group here."""
    monkeypatch.setattr(checkpoint, "_savers", {})
    monkeypatch.setattr(checkpoint, "_COLUMNS", 8)
    states = []

    def make():
        states.append(sized_state(2 * 1024 * 8 * 4, batch_tokens=64))
        return states[0]

    kept = []

    def load(state, folder):
        kept.append({name: tensor.clone() for name, tensor in state.tensors().items()})
        for tensor in state.tensors().values():
            tensor.zero_()
        arm.load(state, folder)

    monkeypatch.setattr(checkpoint, "ARMS", [arm._replace(load=load)])
    figures = measure(arm.label, make, tmp_path)
    loaded = states[0].tensors()
    assert all(torch.equal(loaded[name], before) for name, before in kept[0].items())
    assert figures["bytes"] == 2 * 1024 * 8 * 4
    assert 0 < figures["stall"] <= figures["save"]
    assert figures["slower"] == 0  # no step was taken


def test_a_saver_that_fails_has_a_row():
    assert checkpoint._row("peer", None, "it broke") == {"saver": "peer", "failed": "it broke"}
