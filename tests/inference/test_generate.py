"""With a cache as without, in a batch as alone, on ranks as on one process."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.config import ModelConfig
from archscale.data.tokenizer_base import Tokenizer
from archscale.inference.cache import KeyValueCache
from archscale.inference.generate import (
    Continuation,
    NotFiniteError,
    Request,
    generate,
    window_start,
)
from archscale.inference.native import NativeModel
from archscale.inference.reference import RereadingModel
from archscale.inference.sampling import NOT_FINITE, Sampling, choose_tokens
from archscale.inference.text import TextStream
from archscale.model import Transformer, initialize
from archscale.parallel.mesh import MeshSizes
from archscale.parallel.native import NativeEngine
from tests.export.runs import perturb

CPU = torch.device("cpu")
EOS, VOCABULARY, CONTEXT = 256, 257, 12
MOE = {"sparsity": 4, "top_k": 2}
CASES = {
    "dense": {},
    "plain": {"gated_attention": False, "qk_norm": False, "tied_embeddings": True},
    "one_kv_head_per_head": {"kv_heads": 4},
    "window": {"window": 5},
    "documents": {"eos_id": EOS},
    "documents_window": {"window": 5, "eos_id": EOS},
    "experts": {"moe": MOE},
    "experts_documents": {"moe": MOE, "eos_id": EOS},
}
FIRST = ("dense", "window", "documents_window", "experts_documents")
NAMES = [
    *FIRST,
    *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FIRST),
]
GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling(temperature=1.5, top_k=40, top_p=0.9)


class Bytes(Tokenizer):
    """Every byte a token."""

    kind, file = "bytes", "none"

    def __init__(self) -> None:
        super().__init__(b"", VOCABULARY, EOS, "<eos>")

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token != EOS).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * EOS + [0], np.int32)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def _encode_piece(self, text: str, first: bool) -> list[int]:
        return list(text.encode())

    def _cut(self, text: str, position: int) -> int:
        return position


def make_model(dtype: torch.dtype = torch.float32, **sections) -> Transformer:
    eos_id = sections.pop("eos_id", None)
    defaults = {"depth": 2, "width": 32, "head_dim": 8, "kv_heads": 2, "context": CONTEXT}
    config = ModelConfig(**{**defaults, "vocab_size": VOCABULARY, **sections})
    model = Transformer(config, dtype, eos_id)
    initialize(model, 0)
    perturb(model)
    return model.eval()


def requests(max_tokens: int = 14) -> list[Request]:
    """Texts of different lengths, some longer than the context, some of several documents."""
    made = random.Random(0)
    lengths = [1, 4, 30, CONTEXT, 7, CONTEXT + 1]
    rows = [[EOS, *(made.randrange(256) for _ in range(length))] for length in lengths]
    rows[4][3] = EOS
    return [Request(row, max_tokens - number, seed=number) for number, row in enumerate(rows)]


def continued(model, sampling: Sampling, *, batch: int, **keys) -> list[Continuation]:
    return generate(model, Bytes(), requests(**keys), sampling, batch=batch, ends=frozenset())


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_changes_no_token(name: str) -> None:
    """Neither do the other rows of a batch; also where a text outgrows the context."""
    model = make_model(**CASES[name])
    with_cache = NativeModel(model, CONTEXT, CPU)
    for sampling in (GREEDY, SAMPLED):
        expected = continued(RereadingModel(model, CONTEXT, CPU), sampling, batch=1)
        assert {len(each.tokens) for each in expected} == set(range(9, 15))
        assert len({token for each in expected for token in each.tokens}) > 10
        for batch in (1, 4):
            assert continued(with_cache, sampling, batch=batch) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "documents_window"])
@torch.no_grad()
def test_logits_from_the_cache(name: str, dtype: torch.dtype) -> None:
    """Logits of rows of different lengths, and of several tokens after earlier ones."""
    model = make_model(dtype, **CASES[name])
    tokens = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))
    tokens[:, 2] = EOS
    lengths = [3, 6]
    cache = KeyValueCache(11)
    model(tokens[:, :6], cache=cache)
    cache.advance(lengths)
    for time in (1, 3):
        starts = list(cache.lengths)
        new = torch.stack([row[at : at + time] for row, at in zip(tokens, starts)])
        logits = model(new, cache=cache).logits
        cache.advance([time, time])
        for row, at, found in zip(tokens, starts, logits):
            expected = model(row[None, : at + time]).logits[0, at:]
            # Sums in another order: a few roundings of values of size 3, of which the
            # largest of 257 logits is 15 at most.
            bound = 2e-5 if dtype == torch.float32 else 0.15
            assert (found - expected).abs().max() < bound
    with pytest.raises(ValueError, match="3 tokens after 10 are more than the cache's 11"):
        model(tokens[:, :3], cache=cache)


def test_logits_of_one_position() -> None:
    model = make_model()
    tokens = torch.arange(20).view(2, 10)
    chosen = model(tokens, at=torch.tensor([3, 9])).logits
    assert chosen.shape == (2, 1, VOCABULARY)
    both = model(tokens).logits[[0, 1], [3, 9]]
    torch.testing.assert_close(chosen[:, 0], both, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 200), st.integers(1, 50))
def test_the_window_moves_by_a_quarter_of_the_context(count: int, context: int) -> None:
    start = window_start(count, context)
    assert 0 <= start < count
    assert count - start <= context
    if count > context:
        assert count - start > context - max(1, context // 4)
        assert window_start(count + 1, context) - start in (0, max(1, context // 4))
    else:
        assert start == 0


def on_a_shard(batch: int) -> list[Continuation]:
    model = make_model()

    def fill(sharded: torch.nn.Module) -> None:
        initialize(sharded, 0)

    engine = NativeEngine(
        lambda: Transformer(model.config),
        fill,
        device=CPU,
        sizes=MeshSizes(1, 2, 1),
        reshard=True,
        dtype=torch.float32,
        compile=False,
    )
    return continued(NativeModel(engine.forward, CONTEXT, CPU), SAMPLED, batch=batch, max_tokens=8)


def test_sharded_weights_generate_the_same(pool) -> None:
    alone = make_model()
    initialize(alone, 0)
    expected = continued(NativeModel(alone, CONTEXT, CPU), SAMPLED, batch=3, max_tokens=8)
    assert pool(2).run(on_a_shard, 3, timeout=60) == [expected] * 2


def test_compiled_blocks_are_not_compiled_for_every_length() -> None:
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    model = make_model()
    expected = continued(NativeModel(model, CONTEXT, CPU), GREEDY, batch=4, max_tokens=6)
    for block in model.blocks:
        block.compile(backend=refuse)
    assert continued(NativeModel(model, CONTEXT, CPU), GREEDY, batch=4, max_tokens=6) == expected


def test_ends() -> None:
    """A row that ends makes room for the next, whatever ended it."""
    model = NativeModel(make_model(), CONTEXT, CPU)
    endless = continued(model, GREEDY, batch=2)
    ends = frozenset({endless[1].tokens[4]})
    cut = generate(model, Bytes(), requests(), GREEDY, batch=2, ends=ends)
    for whole, each in zip(endless, cut):
        place = next((at for at, token in enumerate(whole.tokens) if token in ends), None)
        assert each.tokens == whole.tokens[:place]
        assert each.ended == ("length" if place is None else "document")
    assert {each.ended for each in cut} == {"length", "document"}


def test_text_arrives_in_order_and_in_whole() -> None:
    heard: dict[int, str] = {}

    def hear(number: int, text: str) -> None:
        assert text
        heard[number] = heard.get(number, "") + text

    model = NativeModel(make_model(), CONTEXT, CPU)
    results = generate(model, Bytes(), requests(), SAMPLED, batch=4, ends=frozenset(), on_text=hear)
    assert heard == {number: each.text for number, each in enumerate(results)}


def test_weights_that_are_not_finite() -> None:
    model = make_model()
    with torch.no_grad():
        model.head.norm.weight[3] = torch.nan
    with pytest.raises(NotFiniteError, match="after 2 tokens of text 0"):
        continued(NativeModel(model, CONTEXT, CPU), SAMPLED, batch=1)


# --- sampling


def probabilities(sampling: Sampling, logits: list[float]) -> dict[int, float]:
    """Shares of 4,000 draws that are spread evenly over [0, 1)."""
    count = 4000
    rows = torch.tensor([logits]).expand(count, -1)
    tokens = choose_tokens(rows, sampling, [at / count for at in range(count)])
    shares = torch.bincount(tokens, minlength=len(logits)) / count
    return {token: round(share, 3) for token, share in enumerate(shares.tolist()) if share}


def test_shares_of_draws() -> None:
    logits = torch.tensor([0.1, 0.5, 0.0, 0.15, 0.25]).log().tolist()
    everything = {0: 0.1, 1: 0.5, 3: 0.15, 4: 0.25}
    logits[2] = -1e30
    assert probabilities(Sampling(1.0, None), logits) == everything
    assert probabilities(Sampling(1.0, 4), logits) == everything
    assert probabilities(Sampling(1.0, 2), logits) == pytest.approx({1: 2 / 3, 4: 1 / 3}, abs=1e-3)
    # 0.5 alone reaches a half; a little more needs the next one.
    assert probabilities(Sampling(1.0, None, 0.4), logits) == {1: 1.0}
    assert probabilities(Sampling(1.0, None, 0.7), logits) == pytest.approx(
        {1: 2 / 3, 4: 1 / 3}, abs=1e-3
    )
    # Among the two likeliest the first has two thirds.
    assert probabilities(Sampling(1.0, 2, 0.6), logits) == {1: 1.0}
    squares = {1: 0.25, 4: 0.0625, 3: 0.0225, 0: 0.01}
    assert probabilities(Sampling(0.5, None), logits) == pytest.approx(
        {token: share / sum(squares.values()) for token, share in squares.items()}, abs=1e-3
    )
    for smallest in (0.0, 5e-324, 1e-40):
        assert probabilities(Sampling(smallest, None), logits) == {1: 1.0}


def test_only_a_row_that_is_not_finite_has_no_token() -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = torch.inf
    for sampling in (GREEDY, SAMPLED):
        tokens = choose_tokens(logits, sampling, [0.5] * 3).tolist()
        assert [token == NOT_FINITE for token in tokens] == [False, True, False]


# --- text


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """What becomes known with each byte of a text, and at its end."""
    stream = TextStream(Bytes(), [EOS], stop)
    heard = []
    for token in text.encode():
        heard.append(stream.add(token))
        if stream.stopped:
            break
    return [*heard, stream.finish()], stream


def test_characters_are_whole() -> None:
    heard, stream = pieces("aé€")
    assert heard == ["a", "", "é", "", "", "€", ""]
    assert stream.text == "aé€"
    stream = TextStream(Bytes(), [])
    assert [stream.add(token) for token in (0xE2, 0x82)] == ["", ""]
    assert stream.finish() == "\ufffd"
    stream = TextStream(Bytes(), [])
    assert [stream.add(token) for token in (0xE2, 0x82, 0x61)] == ["", "", "\ufffda"]


def texts() -> st.SearchStrategy[str]:
    return st.text(alphabet="ab€", max_size=12)


@settings(max_examples=300, deadline=None)
@given(texts(), st.lists(st.text(alphabet="ab€", min_size=1, max_size=3), max_size=3))
def test_text_ends_exactly_at_the_stop_text(text: str, stop: list[str]) -> None:
    heard, stream = pieces(text, tuple(stop))
    assert "".join(heard) == stream.text
    # Before the first prefix that ends with a stop text, that text.
    for end in range(len(text) + 1):
        complete = [each for each in stop if text[:end].endswith(each)]
        if complete:
            assert stream.stopped
            assert stream.text == text[: end - max(map(len, complete))]
            return
    assert not stream.stopped
    assert stream.text == text


def test_what_may_be_a_stop_text_is_held_back() -> None:
    heard, _ = pieces("a<en<end>b", ("<end>",))
    assert heard == ["a", "", "", "", "<en", "", "", "", "", ""]
