"""Mixtures: exact proportions, constant-time positions, an order that nothing else changes."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.config.batch import BatchSchedule
from archscale.config.sections import DataConfig
from archscale.data.loader import Loader
from archscale.data.mixture import LONGEST_PERIOD, Order, quotas
from archscale.data.sampler import rank_numbers, sample_index
from archscale.data.training_data import (
    TrainingData,
    Vocabulary,
    open_training_data,
    shared_vocabulary,
    training_sources,
)
from archscale.data.validation import validation_sets
from archscale.errors import ConfigError, DataError

from .conftest import FINGERPRINT, write_dataset

CONTEXT = 9
WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=7)


def named(weights: list[float]) -> dict[str, float]:
    return {f"s{place}": weight for place, weight in enumerate(weights)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets, told apart by their tokens: web 0 to 99, code 100 to 199, wiki 200 to 299;
    only wiki's validation split is shorter than a window."""
    folder = tmp_path_factory.mktemp("sets")
    for place, (name, tokens, held) in enumerate(
        [("web", 700, 100), ("code", 300, 50), ("wiki", 91, 9)]
    ):
        ids = 100 * place + np.arange(tokens) % 100
        write_dataset(folder / name, [ids[:250], ids[250:]], [ids[:held]])
    return folder


def mixture(folder: Path, **weights: float) -> DataConfig:
    entries = [
        {"name": name, "path": str(folder / name.split("-")[0]), "weight": weight}
        for name, weight in weights.items()
    ]
    return DataConfig(mixture=entries)


def three(folder: Path, seed: int = 0) -> TrainingData:
    return open_training_data(mixture(folder, web=0.7, code=0.2, wiki=0.1), CONTEXT, seed)


def tokens(data: TrainingData, numbers: np.ndarray) -> np.ndarray:
    """The windows of these samples: [n, context + 1]."""
    inputs, targets, documents = data.windows(numbers)
    assert documents is None
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    return np.concatenate([inputs, targets[:, -1:]], axis=1)


# --- proportions


def test_quotas_are_exact_where_the_period_allows() -> None:
    assert quotas({"b": 0.3, "a": 0.7}) == {"a": 7, "b": 3}
    assert quotas({"a": 0.1, "b": 0.2, "c": 0.3}) == {"a": 1, "b": 2, "c": 3}
    assert quotas({"a": 3e9, "b": 1e9}) == {"a": 3, "b": 1}
    assert quotas({"a": 1e-7, "b": 1.5e-7}) == {"a": 2, "b": 3}
    assert quotas({"only": 0.3}) == {"only": 1}


@given(st.lists(st.floats(0.05, 1e3), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_quotas_are_within_one_sample_of_any_weights(weights: list[float]) -> None:
    parts = quotas(named(weights))
    period, total = sum(parts.values()), sum(Fraction(repr(weight)) for weight in weights)
    assert period <= LONGEST_PERIOD
    for name, weight in named(weights).items():
        assert abs(parts[name] - Fraction(repr(weight)) / total * period) < 1


def test_a_weight_that_rounds_to_nothing_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"weight 1e-09 of source rare is less than one") as error:
        quotas({"web": 1 / 3, "rare": 1e-9})
    enough = float(error.value.remedy.rpartition(" ")[2])
    assert min(quotas({"web": 1 / 3, "rare": enough}).values()) == 1


@given(WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_every_window_has_the_proportions(weights: list[int]) -> None:
    """A beginning of the order is off by at most 1/2 + w (K - 2) / 2, any window by twice that, and
    one of whole periods not at all."""
    parts = quotas(named(weights))
    period, count = sum(parts.values()), len(parts)
    places, own = Order(parts).at(np.arange(3 * period))
    for place, part in enumerate(parts.values()):
        taken = np.concatenate([[0], np.cumsum(places == place)])
        share = part / period
        ahead = taken - np.arange(3 * period + 1) * share
        bound = 0.5 + share * (count - 2) / 2 if count > 1 else 0.0
        assert np.abs(ahead).max() <= bound + 1e-9
        windows = ahead[:, None] - ahead[None, :]
        assert np.abs(windows).max() <= 2 * bound + 1e-9
        assert (taken[period:] - taken[:-period] == part).all()
        assert own[places == place].tolist() == list(range(3 * part))


def test_the_order_is_that_of_webster_and_sainte_lague() -> None:
    """The next sample goes to the source of the largest q / (2 a + 1), a the samples it has had."""
    parts = quotas(named([0.31, 0.07, 0.5, 0.12]))
    had = dict.fromkeys(parts, 0)
    places, _ = Order(parts).at(np.arange(2 * sum(parts.values())))
    for place in places:
        name = max(parts, key=lambda name: Fraction(parts[name], 2 * had[name] + 1))
        assert list(parts)[place] == name
        had[name] += 1


@given(WEIGHTS, st.lists(st.integers(0, 10**15), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_any_position_is_known_without_those_before_it(
    weights: list[int], numbers: list[int]
) -> None:
    parts = quotas(named(weights))
    order, period = Order(parts), sum(parts.values())
    places, own = order.at(np.array(numbers))
    for number, place, rank in zip(numbers, places, own):
        first_place, first_own = order.at(np.array([number % period]))
        part = list(parts.values())[place]
        assert (place, rank) == (first_place[0], number // period * part + first_own[0])


def test_the_order_of_a_mixture_is_frozen() -> None:
    """Another order after an update would change every resumed run."""
    places, own = Order(quotas({"web": 0.6, "code": 0.3, "wiki": 0.1})).at(np.arange(12))
    assert places.tolist() == [1, 0, 1, 1, 0, 2, 1, 1, 0, 1, 1, 0]
    assert own.tolist() == [0, 0, 1, 2, 1, 0, 3, 4, 2, 5, 6, 3]
    places, own = Order(quotas({"a": 1 / 3, "b": math.pi})).at(np.array([10**12]))
    assert (places.item(), own.item()) == (1, 904074668884)


# --- windows


def test_windows_are_those_of_the_sources(sets: Path) -> None:
    data = three(sets)
    assert [source.name for source in data.sources] == ["code", "web", "wiki"]
    assert (data.num_tokens, data.vocab_size, data.eos_id) == (1091, 500, 1)
    numbers = np.arange(10**9, 10**9 + 200)
    block = tokens(data, numbers)
    assert block.shape == (200, CONTEXT + 1)
    counts = np.bincount(block[:, 0] // 100, minlength=3)  # web, code, wiki
    assert counts.tolist() == [140, 40, 20]
    for number, window in zip(numbers, block):
        assert np.array_equal(tokens(data, np.array([number]))[0], window)


def test_a_source_is_passed_over_once_an_epoch(sets: Path) -> None:
    data = three(sets)
    web = data.splits[1]
    block = tokens(data, np.arange(2000))
    windows = block[block[:, 0] // 100 == 0].tolist()
    for epoch in range(3):
        seen = windows[epoch * web.num_samples :][: web.num_samples]
        assert sorted(seen) == sorted(web.sample(i).tolist() for i in range(web.num_samples))


def test_the_order_in_the_yaml_does_not_matter(sets: Path) -> None:
    numbers = np.arange(300)
    block = tokens(three(sets), numbers)
    other = open_training_data(mixture(sets, wiki=1, web=7, code=2), CONTEXT, 0)
    assert np.array_equal(tokens(other, numbers), block)
    assert not np.array_equal(tokens(three(sets, seed=1), numbers), block)


def test_a_path_under_two_names_has_two_orders(sets: Path) -> None:
    twice = mixture(sets, **{"web": 1, "web-again": 1})
    data = open_training_data(twice, CONTEXT, 0)
    block = tokens(data, np.arange(100))
    assert not np.array_equal(block[::2], block[1::2])


def test_train_alone_keeps_the_order_of_the_sampler(sets: Path) -> None:
    data = open_training_data(DataConfig(train=str(sets / "web")), CONTEXT, 5)
    (split,) = data.splits
    indices = sample_index(5, np.arange(200), split.num_samples)
    expected = np.stack([split.sample(i) for i in indices])
    assert np.array_equal(tokens(data, np.arange(200)), expected)


@given(
    world=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    micro=st.integers(1, 3),
    restart=st.integers(0, 5),
    weights=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_a_global_batch_is_the_same_however_it_is_spread(
    sets: Path,
    world: int,
    accumulation: int,
    micro: int,
    restart: int,
    weights: tuple[int, int, int],
    seed: int,
) -> None:
    """Over 1 to 4 processes, accumulation, restarts and mixtures."""
    config = mixture(sets, **dict(zip(("web", "code", "wiki"), weights)))
    size = world * accumulation * micro
    schedule = BatchSchedule(size)
    whole = open_training_data(config, CONTEXT, seed)
    expected = tokens(whole, np.arange(size) + restart * size)
    parts = []
    for rank in range(world):
        fresh = open_training_data(config, CONTEXT, seed)
        numbers = rank_numbers(*schedule.at(restart), rank, world, micro)
        parts += [tokens(fresh, row) for row in numbers]
    assert sorted(np.concatenate(parts).tolist()) == sorted(expected.tolist())


def test_the_loader_reads_a_mixture(sets: Path) -> None:
    data = three(sets)
    with Loader(data, BatchSchedule(10), 5, start_step=7) as loader:
        micro = next(loader)
    block = np.concatenate([batch.inputs.numpy() for batch in micro])
    assert np.array_equal(block, data.windows(np.arange(70, 80)).inputs)
    assert [batch.targets.shape for batch in micro] == [(5, CONTEXT)] * 2


@pytest.mark.parametrize("context", [131_072, 65_536])
def test_long_contexts_from_the_same_shards(tmp_path: Path, context: int) -> None:
    """300,001 tokens in shards that no window fits into."""
    ids = np.arange(300_001) % 499
    write_dataset(tmp_path / "long", np.split(ids, [100_000, 200_000]), [ids[:100]])
    data = open_training_data(DataConfig(train=str(tmp_path / "long")), context, 0)
    (split,) = data.splits
    assert split.num_samples == 300_000 // context
    rows = tokens(data, np.arange(split.num_samples) + split.num_samples * 10**12)
    assert rows.shape == (split.num_samples, context + 1)
    starts = sorted(range(0, split.num_samples * context, context))
    assert sorted(rows[:, 0].tolist()) == sorted(ids[starts].tolist())
    assert all(np.array_equal(row, (row[0] + np.arange(context + 1)) % 499) for row in rows)


# --- what is refused


def retokenize(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "dataset.json").read_text())
    manifest["tokenizer"] |= changes
    (path / "dataset.json").write_text(json.dumps(manifest))


def test_sources_share_a_tokenizer(tmp_path: Path) -> None:
    ids = np.arange(100)
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [ids], [ids])
    config = mixture(tmp_path, a=1, b=1)
    retokenize(tmp_path / "b", fingerprint=FINGERPRINT[::-1])
    with pytest.raises(
        ConfigError,
        match=r"source b of data.mixture was made with another tokenizer than source a of .*"
        r"/b\): prepare both with one tokenizer, such as the one in .*/a$",
    ):
        open_training_data(config, CONTEXT, 0)
    retokenize(tmp_path / "b", fingerprint=FINGERPRINT, eos_id=2)
    with pytest.raises(ConfigError, match=r"end with token 1 in source a, with 2 in source b"):
        open_training_data(config, CONTEXT, 0)
    retokenize(tmp_path / "b", eos_id=1)
    assert open_training_data(config, CONTEXT, 0).eos_id == 1


def test_an_unknown_tokenizer_goes_with_one_of_the_same_size() -> None:
    """And does not hide that two known ones differ."""
    unknown, known = Vocabulary("a", "pa", "", 9), Vocabulary("b", "pb", "x", 9)
    assert shared_vocabulary([unknown, known]) == known
    for other in (Vocabulary("c", "pc", "y", 9), Vocabulary("c", "pc", "", 8)):
        with pytest.raises(ConfigError, match="c was made with another tokenizer than b"):
            shared_vocabulary([unknown, known, other])


def test_every_source_is_checked_before_the_first_step(tmp_path: Path, flip) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [np.arange(100)], [np.arange(50)])
    data = open_training_data(mixture(tmp_path, a=1, b=1), CONTEXT, 0)
    data.check()
    flip(tmp_path / "b" / "train_00000.bin", 150)
    with pytest.raises(DataError, match=r"b/train_00000\.bin"):
        data.check()


# --- validation


def test_sources_are_validated_by_their_weights(sets: Path) -> None:
    """Over those with a window of validation text: not wiki."""
    config = mixture(sets, web=0.6, code=0.2, wiki=0.2)
    held = validation_sets(config, open_training_data(config, CONTEXT, 0))
    assert [(each.name, each.weight) for each in held] == [("code", 0.25), ("web", 0.75)]
    assert {each.split.split for each in held} == {"validation"}
    whole = config.model_copy(update={"val": str(sets / "code")})
    held = validation_sets(whole, open_training_data(whole, CONTEXT, 0))
    assert [(each.name, each.weight) for each in held] == [("", 1), ("code", 0), ("web", 0)]
    alone = DataConfig(train=str(sets / "web"))
    assert validation_sets(alone, open_training_data(alone, CONTEXT, 0)) == []


def test_sources_are_sorted_by_name(sets: Path) -> None:
    parts = [
        (source.name, source.part) for source in training_sources(mixture(sets, web=3, code=1))
    ]
    assert parts == [("code", 1), ("web", 3)]
