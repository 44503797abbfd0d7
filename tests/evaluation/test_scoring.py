"""Likelihoods and windows beside their definitions."""

from types import SimpleNamespace

import pytest
import torch

from archscale.distributed import all_reduce, rank, shared_out
from archscale.errors import CheckpointError, ConfigError
from archscale.inference.scoring import TransformerScores, log_likelihoods, windows
from tests.pool import pool

CONTEXT, VOCABULARY = 8, 17


@pytest.mark.parametrize(
    ("tokens", "context", "stride"), [(2, 8, 8), (9, 8, 8), (30, 8, 8), (30, 8, 3), (31, 7, 1)]
)
def test_every_token_but_the_first_counts_once(tokens: int, context: int, stride: int) -> None:
    counted = []
    for first, stop, count in windows(tokens, context, stride):
        assert 0 <= first < stop <= tokens - 1
        assert stop - first <= context
        targets = range(stop - count + 1, stop + 1)
        for target in targets:  # as much before each as the stride allows, or all there is
            assert target - first >= min(target, context - stride + 1)
        counted += targets
    assert counted == list(range(1, tokens))


class Counting:
    """Logits that depend on all tokens before; counts what it computes."""

    def __init__(self) -> None:
        self.rows = 0
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)

    def __call__(self, tokens: torch.Tensor) -> SimpleNamespace:
        self.rows += len(tokens)
        assert tokens.shape[1] <= CONTEXT
        return SimpleNamespace(logits=self.table[tokens].cumsum(1))


def scores(forward: Counting) -> TransformerScores:
    return TransformerScores(forward, "here", CONTEXT, VOCABULARY, torch.device("cpu"))


def test_likelihoods_are_products_of_softmax() -> None:
    forward = Counting()
    long = [3, 1, 4, 1, 5, 9, 2, 6]
    requests = [
        ([1, 2], [3]),
        ([1, 2], [4]),
        ([7], [8, 9, 10]),
        (long, [5, 3]),
        ([2], [2]),
        ([3], []),
    ]
    likelihoods = log_likelihoods(scores(forward), requests, 2)
    assert forward.rows == 4  # two answers of one token share a row
    for (given, following), likelihood in zip(requests, likelihoods):
        expected, greedy = 0.0, True
        text = [*given, *following][-CONTEXT - 1 :]  # of a longer text the end is read
        for at in range(len(text) - len(following), len(text)):
            row = forward.table[torch.tensor(text[:at])].sum(0)
            expected += float(row.log_softmax(0)[text[at]])
            greedy &= int(row.argmax()) == text[at]
        # Sums of 8 float32 logits of order 1, then a logarithm: a few units of 2^-23 each.
        assert likelihood.log_probability == pytest.approx(expected, abs=2e-5)
        assert likelihood.greedy == greedy


def test_what_cannot_be_scored() -> None:
    with pytest.raises(ConfigError, match="9 tokens is to be scored at once.* context is 8"):
        log_likelihoods(scores(Counting()), [([1], list(range(9)))], 2)
    forward = Counting()
    forward.table[:] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        log_likelihoods(scores(forward), [([1], [2])], 2)


def squares(count: int) -> tuple[list[int], int]:
    done: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        return item * item

    return shared_out(list(range(count)), work), len(done)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_work_is_shared_out_in_order(count: int) -> None:
    """All ranks work equally often."""
    expected = [item * item for item in range(count)]
    assert squares(count) == (expected, count)
    assert pool(2).run(squares, count) == [(expected, -(-count // 2))] * 2


def failing_on_one(item: int) -> float:
    reduced = all_reduce(torch.ones(1)).item()
    if item == 1:
        raise CheckpointError(f"item {item} cannot be done", f"rank {rank()}", "leave it out")
    return reduced


def failure() -> str:
    try:
        shared_out(range(6), failing_on_one)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_failure_is_everybodys() -> None:
    """Nobody begins an item, with collectives of its own, that another rank does not."""
    assert pool(2).run(failure) == ["item 1 cannot be done (rank 1): leave it out"] * 2
