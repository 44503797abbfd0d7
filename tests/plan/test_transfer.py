"""Every rule of the transfer, with numbers worked by hand."""

import math
import re
from pathlib import Path

import pytest

from archscale.config import Config
from archscale.config.sections import MATRIX_RULES, SPHERE_RULES
from archscale.errors import ConfigError
from archscale.plan.transfer import TABLE, budget, problems, resolve, transfer, transfer_of

MODEL = {
    "depth": 8,
    "width": 1024,
    "head_dim": 128,
    "context": 1024,
    "vocab_size": 32000,
    "depth_mup": True,
}
BASE = {"depth": 8, "width": 1024, "lr": 0.01, "tokens": 10**10, "batch_tokens": 2**20}


def config(kind: str, rule: str = "muonh", /, **changes) -> Config:
    model = {
        key: value
        for key, value in changes.items()
        if key in Config.model_fields["model"].annotation.model_fields
    }
    rest = {key: value for key, value in changes.items() if key not in model}
    return Config.from_dict(
        {
            "name": "t",
            "model": {**MODEL, **model},
            "parameterization": {"kind": kind, "base": BASE, **rest.get("parameterization", {})},
            "optimizer": {"matrix": {"rule": rule}, **rest.get("optimizer", {})},
            "data": {"train": "d"},
            "training": {"tokens": 10**10, "batch_tokens": 2**20, **rest.get("training", {})},
        }
    )


def lrs(kind: str, rule: str = "muonh", /, **changes) -> dict[str, float]:
    return {role: of.lr for role, of in transfer_of(config(kind, rule, **changes)).roles.items()}


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("standard", r) for r in MATRIX_RULES] + [(k, r) for k, rs in TABLE.items() for r in rs],
)
def test_at_the_base_nothing_changes(kind, rule):
    assert lrs(kind, rule) == pytest.approx(
        dict.fromkeys(("matrix", "embedding", "head", "vector"), 0.01)
    )


@pytest.mark.parametrize(
    ("kind", "rule", "changes", "matrix", "others"),
    [
        # Depth 32 at the base's width: √(8/32) = 1/2, for every role.
        ("hyperp", "muonh", {"depth": 32}, 0.005, 0.005),
        ("mup++", "moonlight", {"depth": 32}, 0.005, 0.005),
        ("hyperp", "muonh", {"depth": 32, "depth_mup": False}, 0.01, 0.01),
        # Width 4096 at the base's depth: 1, √(1/4), 1/4; what is not a matrix keeps its rate.
        ("hyperp", "muonh", {"width": 4096}, 0.01, 0.01),
        ("hyperp", "adamh", {"width": 4096}, 0.01, 0.01),
        ("hyperp", "orscale_lm_sphere", {"width": 4096}, 0.005, 0.01),
        ("mup++", "adamw", {"width": 4096}, 0.0025, 0.01),
        ("mup++", "muon", {"width": 4096}, 0.01, 0.01),
        ("mup++", "orscale", {"width": 4096}, 0.01, 0.01),
        ("mup++", "orscale_lm", {"width": 4096}, 0.005, 0.01),
        # 32 times the tokens: 32^−0.32 = 2^−1.6.
        ("hyperp", "muonh", {"training": {"tokens": 32 * 10**10}}, 0.01 * 2**-1.6, 0.01 * 2**-1.6),
        ("mup++", "muon", {"training": {"tokens": 32 * 10**10}}, 0.01, 0.01),
        (
            "mup++",
            "muon",
            {"training": {"tokens": 4 * 10**10}, "parameterization": {"token_exponent": 0.5}},
            0.005,
            0.005,
        ),
        (
            "hyperp",
            "muonh",
            {"training": {"tokens": 4 * 10**10}, "parameterization": {"token_exponent": 0}},
            0.01,
            0.01,
        ),
        # Planned for 32 times the tokens, whatever the run's own length.
        (
            "hyperp",
            "muonh",
            {"parameterization": {"planned_tokens": 32 * 10**10}},
            0.01 * 2**-1.6,
            0.01 * 2**-1.6,
        ),
        # A quarter of the batch: 1/2.
        ("hyperp", "muonh", {"training": {"batch_tokens": 2**18}}, 0.005, 0.005),
        ("mup++", "moonlight", {"training": {"batch_tokens": 2**18}}, 0.005, 0.005),
        # All at once, depth 16 and width 2048 (aspect 128): 2^−1/2 · 2^−0.32 · 2.
        (
            "hyperp",
            "muonh",
            {"depth": 16, "width": 2048, "training": {"tokens": 2 * 10**10, "batch_tokens": 2**22}},
            0.02 * 2**-0.82,
            0.02 * 2**-0.82,
        ),
        (
            "standard",
            "adamw",
            {"depth": 16, "width": 2048, "training": {"tokens": 1, "batch_tokens": 2**22}},
            0.01,
            0.01,
        ),
    ],
)
def test_learning_rates_by_hand(kind, rule, changes, matrix, others):
    found = lrs(kind, rule, **changes)
    assert found.pop("matrix") == pytest.approx(matrix, rel=1e-12)
    assert found == pytest.approx(dict.fromkeys(("embedding", "head", "vector"), others), rel=1e-12)


def test_lr_ratio_scales_all_but_the_matrices():
    found = lrs("hyperp", optimizer={"element": {"lr_ratio": 0.3}})
    assert found == pytest.approx(
        {"matrix": 0.01, "embedding": 0.003, "head": 0.003, "vector": 0.003}
    )


def test_the_product_of_the_factors_is_the_rate():
    for role in transfer_of(
        config("hyperp", "orscale_lm_sphere", depth=12, width=2048)
    ).roles.values():
        assert 0.01 * math.prod(factor.value for factor in role.factors) == pytest.approx(role.lr)


def test_rules_of_the_roles():
    rules = {
        kind: {role: of.rule for role, of in transfer_of(config(kind, rule)).roles.items()}
        for kind, rule in (("hyperp", "muonh"), ("mup++", "orscale_lm"), ("standard", "muonh"))
    }
    assert rules["hyperp"] == {
        "matrix": "muonh",
        "embedding": "adamw",
        "head": "adamh",
        "vector": "adamw",
    }
    assert rules["mup++"] == {
        "matrix": "orscale_lm",
        "embedding": "adamw",
        "head": "adamw",
        "vector": "adamw",
    }
    assert rules["standard"] == {
        "matrix": "muonh",
        "embedding": "adamw",
        "head": "adamw",
        "vector": "adamw",
    }
    assert "head" not in transfer_of(config("hyperp", tied_embeddings=True)).roles


def test_weight_decay():
    def decays(kind, rule):
        of = transfer_of(
            config(kind, rule, depth=32, width=4096, optimizer={"weight_decay": 0.1})
        ).roles
        return {role: settings.weight_decay for role, settings in of.items()}

    muon = decays("mup++", "orscale_lm")
    assert muon == {"matrix": pytest.approx(0.025), "embedding": 0, "head": 0, "vector": 0}
    assert decays("mup++", "adamw") == {"matrix": 0.1, "embedding": 0, "head": 0, "vector": 0}
    assert decays("standard", "adamw") == {
        "matrix": 0.1,
        "embedding": 0.1,
        "head": 0.1,
        "vector": 0,
    }


def test_what_else_may_decay():
    """OrScale decays norms too; HyperP's baselines decay by λ η_t / η_peak, whatever η_peak is."""

    def settings(kind, rule, **optimizer):
        changes = {"optimizer": {"weight_decay": 0.1, **optimizer}}
        return transfer_of(config(kind, rule, depth=32, width=4096, **changes)).roles

    roles = settings("standard", "orscale_lm", element={"weight_decay": 0.2})
    assert {role: row.weight_decay for role, row in roles.items()} == {
        "matrix": 0.1,
        "embedding": 0.2,
        "head": 0.2,
        "vector": 0.2,
    }
    roles = settings("mup++", "moonlight", independent_decay=True, element={"weight_decay": 0.2})
    products = {role: row.weight_decay * row.lr for role, row in roles.items()}
    others = dict.fromkeys(("embedding", "head", "vector"), pytest.approx(0.2))
    assert products == {"matrix": pytest.approx(0.025), **others}
    sphere = transfer_of(config("hyperp", "muonh", optimizer={"element": {"weight_decay": 0.2}}))
    decays = {role: row.weight_decay for role, row in sphere.roles.items()}
    assert decays == {"matrix": 0, "embedding": 0.2, "head": 0, "vector": 0.2}


def test_logits_that_every_rule_scales():
    scaled = transfer_of(
        config("mup++", "muon", width=4096, parameterization={"scale_logits": "always"})
    )
    assert (scaled.logit_scale, scaled.router_logit_scale) == (0.25, 1.0)


def test_logit_scales():
    def scales(kind, rule):
        found = transfer_of(config(kind, rule, width=4096))
        return found.logit_scale, found.router_logit_scale

    assert scales("mup++", "adamw") == (0.25, 0.25)
    assert {
        scales(k, r) for k, r in (("mup++", "muon"), ("hyperp", "muonh"), ("standard", "adamw"))
    } == {(1.0, 1.0)}


def test_a_base_larger_than_the_target():
    assert lrs("hyperp", depth=2, width=256)["matrix"] == pytest.approx(0.02)
    assert (
        budget(config("hyperp", depth=2, width=256).model, config("hyperp").parameterization)
        < 10**10
    )


FAMILY = {"head_dim": 128, "kv_heads": 4, "context": 4096}


@pytest.mark.parametrize(("depth", "tokens"), [(8, 10_400_000_000), (12, 28_488_664_987)])
def test_published_token_budgets(depth, tokens):
    published = {
        "depth": 8,
        "width": 1024,
        "lr": 0.01,
        "tokens": 10_400_000_000,
        "batch_tokens": 2**21,
    }
    found = config(
        "hyperp",
        depth=depth,
        width=128 * depth,
        heads=2 * depth,
        **FAMILY,
        parameterization={"base": published},
        training={"tokens": "auto", "batch_tokens": "auto"},
    )
    assert (resolve(found).tokens, resolve(found).batch_tokens) == (tokens, 2**21)


def test_budget_is_the_bases_under_standard():
    assert (
        budget(config("standard", depth=32, width=4096).model, config("standard").parameterization)
        == 10**10
    )


def test_auto_batch_is_the_bases_to_the_nearest_context():
    assert (
        config("hyperp", context=1000, training={"batch_tokens": "auto"}).batch_tokens == 1_049_000
    )
    assert (
        config("standard", context=2**22, training={"batch_tokens": "auto"}).batch_tokens == 2**22
    )  # at least one


def test_the_rate_follows_the_batch_really_used():
    found = resolve(config("hyperp", context=1000, training={"batch_tokens": "auto"}))
    assert transfer_of(found).roles["matrix"].lr == pytest.approx(
        0.01 * math.sqrt(1_049_000 / 2**20)
    )


def test_resolving_is_idempotent():
    once = resolve(config("hyperp", training={"tokens": "auto", "batch_tokens": "auto"}))
    assert resolve(once) is once
    assert transfer_of(Config.from_dict(once.resolved())) == transfer_of(once)


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_one_table_says_what_goes_together(rule):
    for kind, known in TABLE.items():
        made = config(kind, rule)
        found = list(problems(made.parameterization, made.optimizer))
        assert bool(found) == (rule not in known)
        assert all(problem.where == "optimizer.matrix.rule" for problem in found)
    assert set(TABLE["hyperp"]) == set(SPHERE_RULES)


def test_a_page_shows_the_table():
    """Its rows of rules, widths, clips and heads, in whatever order."""
    root = Path(__file__).resolve().parents[2]
    pages = [root / "README.md", *root.glob("archscale/*/README.md")]
    rows = {
        cells[0]: dict(zip(TABLE, cells[1:3]))
        for page in pages
        for line in page.read_text().splitlines()
        if len(cells := line.strip("| ").split(" | ")) == 4
    }
    factors = {0.0: "1", -0.5: "√(w0/w)", -1.0: "w0/w"}
    for kind, known in TABLE.items():
        assert set(re.findall(r"`(\w+)`", rows["matrix rules"][kind])) == set(known)
        widths = rows["width, matrices (w0 base, w model)"][kind]
        shown = {
            rule: value.partition(" (")[0] if value != "√(w0/w)" else value
            for part in widths.split("; ")
            for rules, value in [part.rsplit(": ", 1)]
            for rule in re.findall(r"`(\w+)`", rules)
        }
        assert shown == {rule: factors[own.width] for rule, own in known.items()}
        heads = set(re.findall(r"`(\w+)`", rows["untied head"][kind]))
        assert heads == {own.head for own in known.values()}
    without = re.match(r"(.*) none;", rows["clip"]["hyperp"])[1]
    clipless = {rule for known in TABLE.values() for rule, own in known.items() if not own.clip}
    assert set(re.findall(r"`(\w+)`", without)) == clipless


@pytest.mark.parametrize(
    ("kind", "rule", "changes", "where", "words"),
    [
        (
            "hyperp",
            "orscale_lm",
            {},
            "optimizer.matrix.rule",
            "set it to muonh or .*parameterization.kind to mup\\+\\+ or",
        ),
        (
            "mup++",
            "orscale_lm",
            {"optimizer": {"matrix": {"rule": "orscale_lm", "calibration": 0.5}}},
            "optimizer.matrix.calibration",
            "set it to null, or parameterization.kind to standard",
        ),
        (
            "hyperp",
            "muonh",
            {"optimizer": {"matrix": {"clip": [0.1, 5]}}},
            "optimizer.matrix.clip",
            "set it to null",
        ),
        (
            "mup++",
            "muon",
            {"optimizer": {"element": {"kind": "lion"}}},
            "optimizer.element.kind",
            "set it to adamw",
        ),
    ],
)
def test_a_combination_outside_the_table(kind, rule, changes, where, words):
    c = config(kind, rule, **changes)
    with pytest.raises(ConfigError, match=words) as error:
        transfer(c.model, c.parameterization, c.optimizer, 1, 1)
    assert error.value.where == where


def test_a_budget_without_a_vocabulary():
    with pytest.raises(
        ConfigError, match="vocabulary is not known .training.tokens.: give model.vocab_size"
    ):
        resolve(config("hyperp", vocab_size=None, training={"tokens": "auto"}))


def test_a_base_whose_heads_are_no_whole_number():
    c = config("hyperp", width=1536, heads=7, head_dim=64, training={"tokens": "auto"})
    with pytest.raises(ConfigError, match="base.heads"):
        resolve(c)
    given = config(
        "hyperp",
        width=1536,
        heads=7,
        head_dim=64,
        training={"tokens": "auto"},
        parameterization={"base": {**BASE, "heads": 5, "kv_heads": 5}},
    )
    assert resolve(given).tokens > 10**10


@pytest.mark.parametrize("kind", ["hyperp", "mup++"])
def test_a_missing_base_value(kind):
    with pytest.raises(
        ConfigError,
        match="transfers from a base, and lr, tokens of it are missing.*: give depth, width, lr",
    ):
        Config.from_dict(
            {
                "name": "t",
                "data": {"train": "d"},
                "parameterization": {
                    "kind": kind,
                    "base": {key: BASE[key] for key in ("depth", "width", "batch_tokens")},
                },
            }
        )


def test_the_tokens_that_rates_are_planned_for_are_shown():
    made = config("hyperp", parameterization={"planned_tokens": 32 * 10**10})
    (factor,) = (f for f in transfer_of(made).roles["matrix"].factors if f.name == "tokens")
    assert factor.formula == "(3.2e+11/1e+10)^−0.32"
    assert factor.source == "HyperP; parameterization.planned_tokens"


@pytest.mark.parametrize(
    ("kind", "rule", "exponent"), [("standard", "adamw", None), ("mup++", "muon", 0)]
)
def test_planned_tokens_mean_nothing_where_no_rate_follows_tokens(kind, rule, exponent):
    given = {"planned_tokens": 1, "token_exponent": exponent}
    with pytest.raises(ConfigError, match=rf"no rate follows tokens under {re.escape(kind)}"):
        config(kind, rule, parameterization=given)


def test_token_exponent_means_nothing_to_standard():
    with pytest.raises(ConfigError, match="token_exponent does nothing"):
        config("standard", parameterization={"token_exponent": 0.3})
