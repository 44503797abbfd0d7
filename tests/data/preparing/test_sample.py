"""The sample that a tokenizer is trained on depends on what documents there are, and on nothing
else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import archscale.data.preparing.sample as module
from archscale.data.preparing.sample import TrainingSample

DOCUMENTS = [f"{i} " * (i % 37 + 1) for i in range(60)]


def sample_of(texts: list[str], seed: int = 0, deduplicate: bool = True) -> TrainingSample:
    sample = TrainingSample(seed, deduplicate)
    for text in texts:
        sample.add(text)
    return sample


@given(order=st.permutations(DOCUMENTS), seed=st.integers(0, 3), cut=st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_neither_order_nor_processes_decide(order: list[str], seed: int, cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLE_BYTES", 600)
        texts = sample_of(DOCUMENTS, seed).texts()
        assert sample_of(order, seed).texts() == texts
        merged = sample_of(order[:cut], seed)
        merged.merge(sample_of(order[cut:], seed))
        assert merged.texts() == texts
    longest = max(map(len, DOCUMENTS))
    assert 600 <= sum(map(len, texts)) < 600 + longest
    assert set(texts) < set(DOCUMENTS)


def test_seeds_choose_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_BYTES", 600)
    assert sample_of(DOCUMENTS, 0).texts() != sample_of(DOCUMENTS, 1).texts()


def test_equal_documents_count_once_or_each() -> None:
    once = sample_of(["a", "b", "a"])
    once.merge(sample_of(["b", "c"]))
    assert sorted(once.texts()) == ["a", "b", "c"]
    each = sample_of(["a", "b", "a"], deduplicate=False)
    each.merge(sample_of(["b", "c"], deduplicate=False))
    assert sorted(each.texts()) == ["a", "a", "b", "b", "c"]
