"""The YAML schema: what loads, what is refused and in which words, and the numbers derived from
it."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archscale.config import (
    MATRIX_RULES,
    SPHERE_RULES,
    Config,
    ModelConfig,
    NotYet,
    dump_config,
    load_config,
)
from archscale.config import model as model_module
from archscale.config import schema as config_module
from archscale.config import sections as sections_module
from archscale.config.explain import all_keys
from archscale.config.synonyms import SYNONYMS
from archscale.errors import ConfigError

SMALL = """
name: small
model: {depth: 2, width: 64, head_dim: 16, context: 128}
data: {train: data/small}
training: {tokens: 1e6, batch_tokens: 8192}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return caught.value


# --- what loads


def test_defaults(tmp_path):
    text = "name: a\ndata: {train: d}\ntraining: {tokens: 10.4e9, batch_tokens: 2097152}"
    config = load_config(write(tmp_path, "a.yaml", text))
    assert (config.model.width, config.model.heads, config.model.kv_heads) == (1024, 8, 8)
    assert config.tokens == 10_400_000_000
    assert config.parameterization.base.lr == 0.01
    assert config.optimizer.matrix.rule == "muonh"
    assert config.optimizer.element.betas == (0.9, 0.95)
    assert config.data.val is None


def test_every_key_says_what_it_means():
    undocumented = []
    source = (
        inspect.getsource(sections_module)
        + inspect.getsource(model_module)
        + inspect.getsource(config_module)
    )
    assert source.count("(Section):") > 14
    for section in ast.parse(source).body:
        if not (
            isinstance(section, ast.ClassDef)
            and any(ast.unparse(b) == "Section" for b in section.bases)
        ):
            continue
        for statement, following in zip(section.body, [*section.body[1:], None]):
            documented = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            if isinstance(statement, ast.AnnAssign) and not documented:
                undocumented.append(f"{section.name}.{ast.unparse(statement.target)}")
    assert not undocumented


def test_a_clip_without_a_ratio_is_refused(small):
    with pytest.raises(ConfigError, match=r"moonlight has no trust ratio \(optimizer.matrix.clip"):
        load_config(small, ["optimizer.matrix.rule=moonlight", "optimizer.matrix.clip=[0.1, 1]"])
    with pytest.raises(ConfigError, match="orscale is not calibrated.*set it to null, or choose"):
        load_config(small, ["optimizer.matrix.rule=orscale", "optimizer.matrix.calibration=0.5"])


def test_rules_are_those_of_the_optimizer():
    from archscale.optim import RULES

    assert set(MATRIX_RULES) == set(RULES)
    assert set(SPHERE_RULES) == {name for name, rule in RULES.items() if rule.sphere}
    assert set(sections_module.PLAIN_RULES) == {
        name for name, rule in RULES.items() if rule.ratio is None
    }


@pytest.mark.parametrize(
    "text", ["2000000", "2_000_000", "2e6", "2.0e6", "2.0e+6", "'2000000'", "2000000.0"]
)
def test_numbers_as_people_write_them(small, text):
    tokens = load_config(small, [f"training.tokens={text}"]).training.tokens
    assert tokens == 2_000_000
    assert type(tokens) is int


def test_overrides_are_yaml_and_the_last_one_wins(small):
    overrides = [
        "optimizer.element.betas=[0.8, 0.9]",
        "seed=1",
        "seed=2",
        "model={depth: 4}",
        "model.window=",
    ]
    config = load_config(small, overrides)
    assert config.optimizer.element.betas == (0.8, 0.9)
    assert config.seed == 2
    assert config.model.depth == 4
    assert config.model.width == 64
    assert config.model.window is None


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_every_rule_loads(small, rule):
    assert load_config(small, [f"optimizer.matrix.rule={rule}"]).optimizer.matrix.rule == rule


def test_config_is_frozen(small):
    with pytest.raises(Exception, match="frozen"):
        load_config(small).model.depth = 3


def test_import_does_not_load_torch():
    code = "import sys, archscale.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- inheritance


def test_base_chain_is_relative_to_the_file_that_names_it(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "root.yaml", SMALL)
    write(tmp_path / "sub", "middle.yaml", "base: ../root.yaml\nmodel: {depth: 4}\nseed: 1")
    config = load_config(write(tmp_path, "leaf.yaml", "base: sub/middle.yaml\nname: leaf\nseed: 2"))
    assert (config.name, config.seed, config.model.depth, config.model.head_dim) == (
        "leaf",
        2,
        4,
        16,
    )


def test_lists_and_null_replace(tmp_path):
    parent = SMALL + "optimizer: {element: {betas: [0.5, 0.6]}}"
    write(tmp_path, "root.yaml", parent.replace("context: 128", "context: 128, moe: {top_k: 4}"))
    text = "base: root.yaml\nmodel: {moe: null}\noptimizer: {element: {betas: [0.1, 0.2]}}"
    config = load_config(write(tmp_path, "leaf.yaml", text))
    assert config.model.moe is None
    assert config.optimizer.element.betas == (0.1, 0.2)


def test_base_cycle(tmp_path):
    write(tmp_path, "a.yaml", "base: b.yaml")
    error = refusal(write(tmp_path, "b.yaml", "base: a.yaml"))
    assert "inherits from itself" in error.what
    assert error.where == f"base in {tmp_path / 'a.yaml'}"


def test_base_missing(tmp_path):
    error = refusal(write(tmp_path, "a.yaml", "base: nowhere.yaml"))
    assert "there is no file" in error.what
    assert "nowhere.yaml" in error.what
    assert error.where == f"base in {tmp_path / 'a.yaml'}"


def test_error_names_the_file_that_has_the_key(tmp_path):
    write(tmp_path, "root.yaml", SMALL.replace("head_dim", "hed_dim"))
    error = refusal(write(tmp_path, "leaf.yaml", "base: root.yaml\nmodel: {depth: 4}"))
    assert error.where == f"model.hed_dim in {tmp_path / 'root.yaml'}"
    assert error.remedy == "did you mean head_dim?"


# --- files that cannot be read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- 1\n- 2", "expected `key: value` pairs"),
        ("name: a\nmodel: {depth: 2\n", r"not valid YAML: .*line 3"),
        ("name: a\nseed: 1\nname: b", r'the key "name" is there twice .*line 3'),
        ("name: a\nmodel: {depth: 1, depth: 2}", r'the key "depth" is there twice .*line 2'),
        ("name: a\n1: b", r"the key 1 is not a string.*line 2"),
        ("name: a\nmodel: &m {moe: *m}", "not valid YAML: found unconstructable recursive node"),
        ("name: a\x00b", "not valid YAML"),
        ("name: !!python/object:os.system a", "not valid YAML"),
        ("base: [a.yaml]\nname: a", "expected a file name"),
    ],
)
def test_bad_files(tmp_path, text, message):
    assert re.search(message, str(refusal(write(tmp_path, "a.yaml", text))))


def test_missing_file_folder_and_binary(tmp_path):
    assert "there is no file" in refusal(tmp_path / "a.yaml").what
    assert "cannot read" in refusal(tmp_path).what
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refusal(tmp_path / "b.yaml").what


@pytest.mark.parametrize(
    "override", ["seed", "=1", "a..b=1", ".=1", "seed=[1", "base=x.yaml", "seed={a: 1, a: 2}"]
)
def test_bad_overrides(small, override):
    assert "override" in refusal(small, override).where


# --- keys and types


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("model.hed_dim=3", "did you mean head_dim?"),
        ("modle.depth=3", "did you mean model?"),
        ("telemetry.wandb.projct=x", "did you mean project?"),
        ("checkpoint.async_=true", "did you mean async?"),
        ("optimizer.lr=0.1", "did you mean parameterization.base.lr?"),
        ("optimizer.matrix.rulee=muon", "did you mean rule?"),
        ("eval.zzz=1", "the keys here are every, batches, tasks, samples"),
        ("model.moe.topk=4", "did you mean top_k?"),
        ("data.mixture=[{name: a, path: a, weight: 1, wieght: 2}]", "did you mean weight?"),
    ],
)
def test_unknown_key(small, override, remedy):
    error = refusal(small, override)
    assert error.what.startswith("unknown key")
    assert error.where.endswith(f" in override {override}")
    assert error.remedy == remedy


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("model.depth=two", 'got "two", expected a whole number of at least 1'),
        ("model.depth=0", "got 0, expected a whole number of at least 1"),
        ("model.depth=true", "got true, expected a whole number of at least 1"),
        ("model.depth=1.5", "got 1.5, expected a whole number of at least 1"),
        ("model.depth=null", "got null, expected a whole number of at least 1"),
        ("model.width=-4", "got -4, expected a whole number of at least 1 or null"),
        ("model.window=0", "got 0, expected a whole number of at least 1"),
        ("training.tokens=2.1M", 'got "2.1M", expected a whole number of at least 1 or auto'),
        ("training.tokens=-5", "got -5, expected a whole number of at least 1 or auto"),
        ("model.mlp_ratio=1e300", "got 1e+300, expected a number above 0"),
        (
            "seed=9223372036854775808",
            "got 9223372036854775808, expected a whole number of at least 0",
        ),
        (
            "training.batch_tokens=.inf",
            "got Infinity, expected a whole number of at least 1 or auto",
        ),
        ("parallel.shard=many", 'got "many", expected a whole number of at least 1 or auto'),
        ("parallel.replicate=0", "got 0, expected a whole number of at least 1"),
        ("parameterization.base.lr=0", "got 0, expected a number above 0"),
        ("parameterization.base.lr=.nan", "got NaN, expected a number above 0"),
        ("optimizer.weight_decay=-1", "got -1, expected a number of at least 0"),
        ("optimizer.matrix.momentum=1", "got 1, expected a number in [0, 1)"),
        (
            "optimizer.element.betas=[0.9, 1.0]",
            "got [0.9, 1.0], expected a list of two numbers in [0, 1)",
        ),
        ("optimizer.element.betas=[0.9]", "got [0.9], expected a list of two numbers in [0, 1)"),
        (
            "optimizer.matrix.clip=[-1, 1]",
            "got [-1, 1], expected a list of two numbers of at least 0",
        ),
        ("schedule.final_ratio=1.1", "got 1.1, expected a number in [0, 1]"),
        ("training.compile=1", "got 1, expected true or false"),
        ("training.compile='yes'", 'got "yes", expected true or false'),
        ("name=3", "got 3, expected text"),
        ("name=''", 'got "", expected text that is not empty'),
        ("model=3", "got 3, expected a section of `key: value` pairs"),
        ("data=null", "got null, expected a section of `key: value` pairs"),
        ("data.mixture=x", 'got "x", expected a list'),
        ("data.mixture=[]", "got [], expected a list that is not empty"),
        ("telemetry.wandb.mode=off", 'got "off", expected one of auto, online, offline, disabled'),
        ("parallel.zero_stage=4", "got 4, expected one of 1, 2, 3"),
    ],
)
def test_wrong_type_or_range(small, override, what):
    error = refusal(small, override)
    assert (error.what, error.where) == (what, f"{override.split('=')[0]} in override {override}")


@pytest.mark.parametrize(
    ("key", "wrong", "meant"),
    [
        ("model.mlp", "swigl", "swiglu"),
        ("optimizer.matrix.rule", "orscalelm", "orscale_lm"),
        ("optimizer.matrix.orthogonalizer", "polarexpress", "polar_express"),
        ("optimizer.matrix.compute_dtype", "float16", "bfloat16"),
        ("optimizer.element.kind", "adam", "adamw"),
        ("schedule.kind", "cosin", "cosine"),
        ("training.precision", "fp23", "fp32"),
    ],
)
def test_wrong_choice(small, key, wrong, meant):
    error = refusal(small, f"{key}={wrong}")
    assert f'got "{wrong}", expected one of ' in error.what
    assert error.remedy == f"did you mean {meant}?"


def test_required_keys(tmp_path):
    error = refusal(write(tmp_path, "a.yaml", "data: {train: d}"))
    assert (error.what, error.remedy) == ("name is missing", "add `name`")
    error = refusal(write(tmp_path, "a.yaml", "name: a"))
    assert error.what == "data.train is missing"


MIXTURE = "[{name: a, path: d, weight: 1}, {name: b, path: d, weight: 0.5}]"


def test_a_mixture_stands_in_place_of_train(small, tmp_path):
    config = load_config(small, ["data.train=null", f"data.mixture={MIXTURE}"])
    assert [entry.name for entry in config.data.mixture] == ["a", "b"]
    assert config.data.training_paths == ["d"]
    dump_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("mixture", "what", "remedy"),
    [
        (MIXTURE, "data.mixture stands in place of data.train, and both are given", "set one of"),
        (MIXTURE.replace("b,", "a,"), "2 sources are named a", "give each a name of its own"),
        (MIXTURE.replace("b,", "a/b,"), "expected a name of letters, digits", "give a name of"),
        (MIXTURE.replace("b,", "3,"), "got 3, expected a name of letters, digits", "give a name"),
        (MIXTURE.replace("0.5", "0"), "got 0, expected a number above 0", "give a number above 0"),
    ],
)
def test_mixtures_that_cannot_be(small, mixture, what, remedy):
    train = [] if "both" in what else ["data.train=null"]
    error = refusal(small, *train, f"data.mixture={mixture}")
    assert what in error.what
    assert error.remedy.startswith(remedy)


def test_counts_the_other_problems_and_begins_with_misspelt_keys(tmp_path):
    error = refusal(write(tmp_path, "a.yaml", "nmae: a\nseed: x\ndata: {train: d}"))
    assert error.what == 'unknown key "nmae"'
    assert error.remedy == "did you mean name? (and 2 more problems)"


@pytest.mark.parametrize("name", ["../a", "a/b", ".hidden", "a\\b", '"a\\nb"'])
def test_name_must_be_able_to_name_a_directory(small, name):
    assert refusal(small, f"name={name}").where.startswith("name in ")


# --- what does not exist yet


def test_not_yet(small, monkeypatch):
    """Can be planned; training refuses it."""
    row = NotYet("eval.every", lambda value: value == 7, "every seventh step", "set it to 8")
    monkeypatch.setattr("archscale.config.schema.NOT_YET", [row])
    assert not list(load_config(small).unavailable())
    (error,) = load_config(small, ["eval.every=7"]).unavailable()
    assert error.what == "every seventh step is not available yet"
    assert (error.where, error.remedy) == (row.key, row.remedy)


def test_override_through_a_null_section_creates_it(small):
    assert load_config(small, ["model.moe=null", "model.moe.top_k=4"]).model.moe.top_k == 4


# --- combinations


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["model.aspect=40"], "model.width", "width 64 is not aspect 40 × depth 2"),
        (["model.aspect=null", "model.width=null"], "model.width", "both null"),
        (["model.head_dim=15", "model.heads=4"], "model.head_dim", "head_dim 15 is odd"),
        (
            ["model.head_dim=24"],
            "model.head_dim",
            "set model.head_dim: 16 or 32, or model.width: 48 or 72",
        ),
        (["model.kv_heads=3"], "model.kv_heads", "does not divide heads 4.*set it to 2 or 4"),
        (["model.kv_heads=8"], "model.kv_heads", "does not divide heads 4.*set it to 4$"),
        (["model.mlp_ratio=2.67"], "model.mlp_ratio", "set it to 2.671875"),
        (["model.moe.top_k=1"], "model.moe.top_k", "leaves no routed one"),
        (
            ["model.moe={top_k: 2, balance_weight: 0}"],
            "model.moe.balance_weight",
            "above 0, or top_k to at least 3$",
        ),
        (
            ["model.moe={top_k: 4, balance: sequence, balance_scope: previous}"],
            "model.moe.balance_scope",
            "each sequence has its own loads, so .* set it to step",
        ),
        (["model.moe.top_k=7"], "model.moe.top_k", "does not divide 256 .*set it to 4 or 8"),
        (
            ["model.init=fan_in_tied", "model.tied_embeddings=false"],
            "model.init",
            "set it to fan_in, or model.tied_embeddings to true",
        ),
        (
            ["optimizer={matrix: {rule: orscale}, weight_decay: 0.1, independent_decay: true}"],
            "optimizer.matrix.rule",
            "not independent of the rate.*set optimizer.independent_decay to false",
        ),
        (
            ["optimizer.matrix={rule: adamw, fused_qkv: true}"],
            "optimizer.matrix.fused_qkv",
            "adamw sees no matrices.*set it to false",
        ),
        (
            ["model.mlp=relu2", "optimizer.matrix.fused_gate_up=true"],
            "optimizer.matrix.fused_gate_up",
            "relu2 has no gate.*set it to false",
        ),
        (
            ["optimizer.matrix={per_head: true, fused_qkv: true}"],
            "optimizer.matrix.fused_qkv",
            "cuts queries, keys and values into heads.*set one of them to false",
        ),
        (["optimizer.matrix.clip=[2, 1]"], "optimizer.matrix.clip", "is above the upper bound"),
        (
            ["training.batch_tokens=1000"],
            "training.batch_tokens",
            "multiple of model.context 128.*896 or 1024",
        ),
        (
            ["training.batch_tokens=100"],
            "training.batch_tokens",
            "multiple of model.context 128.*set it to 128$",
        ),
        (
            ["schedule.warmup_tokens=2e6"],
            "schedule.warmup_tokens",
            "exceeds the 1000000 tokens of training",
        ),
        (
            ["schedule.kind=wsd", "schedule.warmup_tokens=9e5"],
            "schedule.warmup_tokens",
            "714285 .*before the wsd",
        ),
        (["parallel.zero_stage=2"], "parallel.zero_stage", "means nothing to the native engine"),
        (["parallel.shard=4", "parallel.expert=3"], "parallel.expert", "does not divide shard 4"),
    ],
)
def test_combinations(small, overrides, key, message):
    error = refusal(small, *overrides)
    assert error.where.startswith(f"{key} in ")
    assert re.search(message, f"{error.what}: {error.remedy}")


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_weight_decay_only_where_it_does_something(small, rule):
    overrides = [f"optimizer.matrix.rule={rule}", "optimizer.weight_decay=0.1"]
    if rule in SPHERE_RULES:
        assert "does nothing under" in refusal(small, *overrides).what
    else:
        assert load_config(small, overrides).optimizer.weight_decay == 0.1


def test_width_decides_the_aspect_unless_both_are_written():
    assert ModelConfig(depth=4, width=512).aspect == 128
    assert ModelConfig(depth=3, width=128).aspect is None
    assert ModelConfig(depth=4, aspect=64, width=256, head_dim=64).width == 256
    assert ModelConfig(depth=4, aspect=64, head_dim=64).width == 256


# --- derived numbers


def small_config(**training) -> Config:
    model = {"depth": 2, "width": 64, "head_dim": 16, "context": training.pop("context", 128)}
    parallel = training.pop("parallel", {})
    training = {"tokens": 10**6, "batch_tokens": 8192} | training
    return Config.from_dict(
        {
            "name": "a",
            "data": {"train": "d"},
            "model": model,
            "training": training,
            "parallel": parallel,
        }
    )


@given(tokens=st.integers(1, 10**13), sequences=st.integers(1, 10**5))
def test_steps_are_nearest(tokens, sequences):
    config = small_config(tokens=tokens, batch_tokens=sequences * 128)
    assert config.batch_size == sequences
    assert config.steps >= 1
    difference = abs(config.steps * config.batch_tokens - tokens)
    assert 2 * difference <= config.batch_tokens or config.steps == 1


@given(sequences=st.integers(1, 300), micro=st.integers(1, 40), world=st.integers(1, 24))
def test_accumulation_divides_or_names_what_would(sequences, micro, world):
    config = small_config(batch_tokens=sequences * 128, micro_batch=micro)
    if sequences % (micro * world) == 0:
        assert config.accumulation(world) * micro * world == sequences
        return
    with pytest.raises(ConfigError) as caught:
        config.accumulation(world)
    error = caught.value
    if sequences % world == 0:
        assert error.where == "training.micro_batch"
        fits, batch = map(int, re.findall(r"\d+", error.remedy))
        assert small_config(batch_tokens=sequences * 128, micro_batch=fits).accumulation(world)
        larger = range(fits + 1, micro + 1)
        assert not any((sequences // world) % size == 0 for size in larger)
        assert small_config(batch_tokens=batch, micro_batch=micro).accumulation(world)
    else:
        assert error.where == "training.batch_tokens"
        batch, *other = map(int, re.findall(r"\d+", error.remedy))
        assert small_config(batch_tokens=batch, micro_batch=micro).accumulation(world)
        if other:
            assert small_config(batch_tokens=other[0], micro_batch=other[1]).accumulation(world)


def test_shard_size():
    assert small_config().shard_size(8) == 8
    assert small_config(parallel={"replicate": 2}).shard_size(8) == 4
    assert small_config(parallel={"replicate": 8, "shard": 1}).shard_size(8) == 1
    with pytest.raises(
        ConfigError, match=r"replicate 3 does not divide the 8 ranks .*: set it to 2 or 4"
    ):
        small_config(parallel={"replicate": 3}).shard_size(8)
    with pytest.raises(
        ConfigError, match=r"replicate 2 × shard 3 is 6, not the 8 ranks .*: start 6 ranks"
    ):
        small_config(parallel={"replicate": 2, "shard": 3}).shard_size(8)


def test_with_vocab():
    config = small_config()
    assert config.with_vocab(500).model.vocab_size == 500
    assert config.model.vocab_size is None
    padded = config.with_vocab(512)
    assert padded.with_vocab(500).model.vocab_size == 512
    with pytest.raises(ConfigError, match="vocab_size 512 is smaller than the data's 513 tokens"):
        padded.with_vocab(513)


def test_auto_dtypes_follow_the_precision():
    assert (small_config().compute_dtype, small_config().wire_dtype) == ("bfloat16", "bfloat16")
    full = small_config(precision="fp32")
    assert (full.compute_dtype, full.wire_dtype) == ("float32", "float32")


def test_with_precision_replaces_auto_alone():
    auto = small_config(precision="auto")
    assert [auto.with_precision(p).precision for p in ("bf16", "fp32")] == ["bf16", "fp32"]
    assert auto.with_precision("fp32").compute_dtype == "float32"
    assert small_config(precision="bf16").with_precision("fp32").precision == "bf16"
    with pytest.raises(AssertionError):
        auto.compute_dtype  # noqa: B018  nobody may take auto for bf16


# --- round trip

printable = {"codec": "utf-8", "exclude_categories": ("C", "Z"), "include_characters": " "}
text = st.text(st.characters(**printable), min_size=1, max_size=20)
name = st.text(st.characters(**printable, exclude_characters="/\\."), min_size=1, max_size=20)
positive = st.floats(1e-12, 1e12)
below_one = st.floats(0, 1, exclude_max=True)


@st.composite
def configs(draw) -> dict:
    context, head_dim, heads = (
        draw(st.integers(1, 4096)),
        2 * draw(st.integers(1, 64)),
        draw(st.integers(1, 32)),
    )
    model = {
        "depth": draw(st.integers(1, 64)),
        "width": heads * head_dim,
        "head_dim": head_dim,
        "context": context,
    }
    model |= {"rope_theta": draw(positive), "mlp": draw(st.sampled_from(["swiglu", "relu2"]))}
    tokens = draw(st.integers(1, 10**15))
    low, high = sorted([draw(positive), draw(positive)])
    matrix = {"rule": draw(st.sampled_from(MATRIX_RULES)), "momentum": draw(below_one)}
    plain = matrix["rule"] in sections_module.PLAIN_RULES  # no trust ratio to clip
    matrix["clip"] = None if plain else draw(st.sampled_from([None, [low, high]]))
    element = {"betas": [draw(below_one), draw(below_one)], "eps": draw(positive)}
    return {
        "name": draw(name),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "model": model,
        "parameterization": {"base": {"lr": draw(positive)}},
        "optimizer": {
            "matrix": matrix,
            "element": element,
            "grad_clip": draw(st.none() | positive),
        },
        "schedule": {"final_ratio": draw(below_one), "decay_ratio": draw(st.floats(1e-12, 1))},
        "data": {"train": draw(text), "val": draw(st.none() | text)},
        "training": {"tokens": tokens, "batch_tokens": context * draw(st.integers(1, 1000))},
        "parallel": {"shard": draw(st.just("auto") | st.integers(1, 64))},
    }


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(data=configs())
def test_dump_loads_as_an_equal_config(tmp_path, data):
    config = Config.from_dict(data)
    path = tmp_path / "dump.yaml"
    dump_config(config, path)
    loaded = load_config(path)
    assert loaded == config
    assert (
        loaded.resolved() == config.resolved() == yaml.safe_load(path.read_text(encoding="utf-8"))
    )
    assert os.listdir(tmp_path) == ["dump.yaml"]


def test_resolved_is_complete(small):
    resolved = load_config(small).resolved()
    assert "base" not in resolved
    assert (
        resolved["model"]["width"],
        resolved["model"]["heads"],
        resolved["model"]["kv_heads"],
    ) == (64, 4, 4)
    assert resolved["checkpoint"] == {
        "every": 1000,
        "keep": 3,
        "keep_every": None,
        "directory": None,
        "async": True,
    }


def test_failed_dump_leaves_the_old_file(small, tmp_path, monkeypatch):
    config = load_config(small)
    before = small.read_text()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        dump_config(config, small)
    assert small.read_text() == before
    assert os.listdir(tmp_path) == ["small.yaml"]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("n_layers", "model.depth"),
        ("model.num_layers", "model.depth"),
        ("hidden_size", "model.width"),
        ("model.d_model", "model.width"),
        ("model.n_heads", "model.heads"),
        (
            "epochs",
            (
                r"training.tokens (epochs × tokens of the data set, which `archscale data inspect`"
                r" prints)"
            ),
        ),
        ("steps", "training.tokens (steps × training.batch_tokens)"),
        ("training.max_steps", "training.tokens (steps × training.batch_tokens)"),
        ("training.batch_size", "training.batch_tokens (sequences × model.context)"),
        (
            "optimizer.name",
            "optimizer.matrix.rule (of matrices; optimizer.element.kind is the rule of all else)",
        ),
        ("optimizer.learning-rate", "parameterization.base.lr"),
        ("training.lr", "parameterization.base.lr"),
        ("optimizer.matrix.weight_decay", "optimizer.weight_decay"),
        ("schedule.warmup_steps", "schedule.warmup_tokens (steps × training.batch_tokens)"),
        ("output_dir", "the option --run-dir of archscale train"),
    ],
)
def test_names_of_other_libraries(small, wrong, meant):
    error = refusal(small, f"{wrong}=1")
    assert error.what.startswith("unknown key")
    assert error.remedy == f"did you mean {meant}?"


def test_synonyms_lead_to_keys_and_hide_none():
    keys = list(all_keys(Config))
    assert {meant.key for meant in SYNONYMS.values()} - {""} <= set(keys)
    assert not SYNONYMS.keys() & set(keys)
    last = {key.rpartition(".")[2] for key in keys}
    for name, meant in SYNONYMS.items():
        # A name that is a key of ours elsewhere leads to that key.
        assert name not in last or meant.key.rpartition(".")[2] == name
