"""`matrix_groups`: every parameter once, by the type of its module, and refused where no type
says."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

from archscale.config.model import ModelConfig, MoEConfig
from archscale.model import Transformer
from archscale.optim import MatrixOptimizer, matrix_groups
from archscale.optim.roles import assign_roles, parameter_groups


class Unknown(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.table = nn.Parameter(torch.randn(*shape))
        self.gain = nn.Parameter(torch.ones(shape[-1]))
        self.scale = nn.Parameter(torch.tensor(1.0))


class LanguageModel(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.head = nn.Linear(8, 20, bias=False)  # before the embedding, on purpose
        self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.tokens = nn.Embedding(20, 8)
        if tie:
            self.head.weight = self.tokens.weight


def taken(groups):
    """What each parameter was taken as, by name."""
    found = {}
    for group in groups:
        for (name, _), blocks in zip(group["params"], group["blocks"], strict=True):
            assert name not in found
            kind = group["role"] if group["view"] is None else group["view"]
            extra = [", ".join(f"{block} {rows}" for block, rows in blocks)] if blocks else []
            found[name] = " ".join([kind, *extra, *["transposed"] * group["transposed"]])
    return found


@pytest.mark.parametrize(
    ("module", "weights"),
    [
        (nn.Linear(4, 6), {"weight": "matrix"}),
        (nn.Bilinear(3, 4, 5), {"weight": "flatten"}),
        (nn.Conv1d(4, 6, 3), {"weight": "flatten"}),
        (nn.Conv2d(1, 6, 3), {"weight": "flatten"}),
        (nn.Conv3d(4, 6, 3, groups=2), {"weight": "flatten group0 3, group1 3"}),
        (nn.Conv2d(6, 6, 3, groups=6), {"weight": "vector"}),
        (nn.Conv2d(6, 12, 3, groups=6), {"weight": "vector"}),
        (nn.ConvTranspose2d(4, 6, 3), {"weight": "flatten transposed"}),
        (
            nn.ConvTranspose2d(4, 6, 3, groups=2),
            {"weight": "flatten group0 2, group1 2 transposed"},
        ),
        (nn.ConvTranspose1d(6, 6, 3, groups=6), {"weight": "vector"}),
        (
            nn.LSTM(3, 4, proj_size=2, bidirectional=True),
            {
                f"weight_{kind}_l0{way}": taken_as
                for way in ("", "_reverse")
                for kind, taken_as in {
                    "ih": "matrix i 4, f 4, g 4, o 4",
                    "hh": "matrix i 4, f 4, g 4, o 4",
                    "hr": "matrix",
                }.items()
            },
        ),
        (nn.GRUCell(3, 4), dict.fromkeys(("weight_ih", "weight_hh"), "matrix r 4, z 4, n 4")),
        (nn.RNN(3, 4), dict.fromkeys(("weight_ih_l0", "weight_hh_l0"), "matrix")),
        (
            nn.MultiheadAttention(8, 2, add_bias_kv=True),
            {
                "in_proj_weight": "matrix q 8, k 8, v 8",
                "out_proj.weight": "matrix",
                "bias_k": "vector",
                "bias_v": "vector",
            },
        ),
        (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            dict.fromkeys([*(f"{x}_proj_weight" for x in "qkv"), "out_proj.weight"], "matrix"),
        ),
        (nn.Embedding(5, 4), {"weight": "embedding"}),
        (nn.EmbeddingBag(5, 4), {"weight": "embedding"}),
        (nn.LayerNorm((3, 4)), {"weight": "vector", "bias": "vector"}),
        (nn.RMSNorm((3, 4)), {"weight": "vector"}),
        (
            nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10]),
            dict.fromkeys(
                ("head.weight", *(f"tail.{i}.{j}.weight" for i in range(2) for j in range(2))),
                "head",
            ),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_known_modules(module, weights):
    groups = matrix_groups(module)
    assert {name: kind for name, kind in taken(groups).items() if kind != "vector"} == {
        name: kind for name, kind in weights.items() if kind != "vector"
    }
    given = [id(p) for group in groups for _, p in group["params"]]
    assert sorted(given) == sorted(map(id, module.parameters()))
    assert all(g["rule"] == "adamw" for g in groups if g["role"] != "matrix")
    assert all("rule" not in g for g in groups if g["role"] == "matrix")
    assert [g["weight_decay"] for g in groups if g["role"] == "vector"] in ([], [0.0])


def test_a_subclass_counts_as_its_base_and_the_most_specific_type_decides():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 5))
    assert taken(matrix_groups(model))["0.weight"] == "matrix"
    kinds = taken(matrix_groups(model, kinds={Special: "embedding"}))
    assert (kinds["0.weight"], kinds["1.weight"]) == ("embedding", "matrix")
    kinds = taken(matrix_groups(model, kinds={Special: "embedding", "0.weight": "vector"}))
    assert kinds["0.weight"] == "vector"


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, **sizes)
    qwen = transformers.Qwen3Config(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=12,
        tie_word_embeddings=False,
        **sizes,
    )
    with torch.device("meta"):
        tied = transformers.GPT2LMHeadModel(gpt2)
        untied = transformers.Qwen3ForCausalLM(qwen)
    kinds = taken(matrix_groups(tied))
    assert kinds["transformer.wte.weight"] == kinds["transformer.wpe.weight"] == "embedding"
    assert kinds["transformer.h.1.attn.c_attn.weight"] == "matrix transposed"
    assert "head: lm_head.weight (tied: follows the embedding)" in repr(matrix_groups(tied))
    kinds = taken(matrix_groups(untied))
    assert kinds["lm_head.weight"] == "head"
    assert kinds["model.layers.0.input_layernorm.weight"] == "vector"
    assert set(kinds) == {name for name, _ in untied.named_parameters()}


def test_our_own_model_declares_itself():
    moe = MoEConfig(sparsity=2, top_k=2)
    config = ModelConfig(depth=2, aspect=16, head_dim=16, vocab_size=64, moe=moe)
    with torch.device("meta"):
        model = Transformer(config)
    roles = ("matrix", "embedding", "head", "vector")
    expected = parameter_groups(assign_roles(model), {role: {} for role in roles})
    assert taken(matrix_groups(model)) == taken(expected)
    assert {group["role"] for group in expected} == set(roles)


# --- heads


@pytest.mark.parametrize("choice", ["module", "name", "list"])
def test_the_head_is_named_by_the_user(choice):
    model = LanguageModel()
    head = {"module": model.head, "name": "head", "list": [model.head]}[choice]
    groups = matrix_groups(model, head=head)
    assert taken(groups)["head.weight"] == "head"
    assert "head: head.weight\n" in repr(groups)


def test_a_tied_head_follows_the_embedding_whichever_comes_first():
    model = LanguageModel(tie=True)
    for head in (None, model.head, "head", ()):
        kinds = taken(matrix_groups(model, head=head))
        assert kinds["head.weight"] == "embedding"  # by the name that named_parameters() gives it
        assert "tokens.weight" not in kinds
    assert "tied: follows the embedding" in repr(matrix_groups(model, head=model.head))


def test_a_lone_linear_of_an_embeddings_shape_has_to_be_explained():
    with pytest.raises(ValueError, match=r"'head.weight'.*'tokens.weight'.*head='head'.*head=\(\)"):
        matrix_groups(LanguageModel())
    groups = matrix_groups(LanguageModel(), head=())
    assert taken(groups)["head.weight"] == "matrix"
    assert "head: none\n" in repr(groups)
    positions = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert taken(matrix_groups(positions))["1.weight"] == "matrix"  # heads are alone


def test_what_is_no_head_is_refused():
    with pytest.raises(ValueError, match="head: 'haed' is no module of the model"):
        matrix_groups(LanguageModel(), head="haed")
    with pytest.raises(ValueError, match="head: this Linear is no module of the model"):
        matrix_groups(LanguageModel(), head=nn.Linear(2, 2))


# --- what no type explains


def test_an_unknown_module_is_refused_with_every_remedy():
    model = nn.Sequential(Unknown(3, 4, 5), nn.ParameterList([torch.zeros(2, 2)]))
    with pytest.raises(ValueError, match="'0.table' of shape") as refused:
        matrix_groups(model)
    text = str(refused.value)
    assert "\n" not in text
    assert "(and 1 more parameters)" in text
    assert "kinds={Unknown: ..., ParameterList: ...}" in text
    groups = matrix_groups(model, kinds={Unknown: "stack", nn.ParameterList: "embedding"})
    kinds = taken(groups)
    assert (kinds["0.table"], kinds["1.0"]) == ("stack", "embedding")
    assert kinds["0.gain"] == kinds["0.scale"] == "vector"


def test_kinds_by_name_and_with_blocks():
    model = nn.Sequential(nn.Linear(4, 6), Unknown(2, 6, 4))
    blocks = [("gate", 2), ("up", 4)]
    kinds = {
        "0.weight": {"role": "matrix", "blocks": blocks},
        "1.table": {"role": "matrix", "view": "stack", "blocks": blocks},
    }
    groups = matrix_groups(model, kinds=kinds)
    assert taken(groups)["0.weight"] == "matrix gate 2, up 4"
    optimizer = MatrixOptimizer(groups, lr=0.1)
    assert [(view[1], *view[2:]) for view in optimizer.views()] == [
        ("0.weight.gate", 2, 4),
        ("0.weight.up", 4, 4),
        ("1.table[0].gate", 2, 4),
        ("1.table[0].up", 4, 4),
        ("1.table[1].gate", 2, 4),
        ("1.table[1].up", 4, 4),
    ]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({nn.Conv1d: "matrix"}, "kinds: no weight of the model has type Conv1d"),
        ({"0.wieght": "matrix"}, "kinds: no weight of the model has parameter '0.wieght'"),
        ({Unknown: "matrx"}, "parameter '0.table': unknown kind 'matrx': use one of matrix, stack"),
        ({Unknown: {"role": "matrx"}}, "parameter '0.table': unknown role 'matrx'"),
        ({Unknown: {"role": "matrix", "view": "flat"}}, "'0.table': unknown view 'flat'"),
        ({Unknown: "matrix"}, r"'0.table' of shape \(3, 4, 5\): .* has 2 dimensions"),
        (
            {Unknown: {"role": "matrix", "view": "flatten", "blocks": [("a", 4)]}},
            r"'0.table': blocks \[\('a', 4\)\] do not sum to its 3 rows",
        ),
        ({Unknown: "stack", "0.gain": "matrix"}, r"'0.gain' of shape \(5,\)"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(kinds, message):
    with pytest.raises(ValueError, match=message):
        matrix_groups(nn.Sequential(Unknown(3, 4, 5)), kinds=kinds)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_that_its_type_does_not_have_is_unknown():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="belongs to a ParametrizationList"):
        matrix_groups(normed)
    with pytest.raises(ValueError, match="'weight' has no shape yet: run a batch"):
        matrix_groups(nn.LazyLinear(4))


# --- options, frozen weights, wrappers


def test_options_reach_their_groups():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    element = {"rule": "lion", "lr": 1e-4, "weight_decay": 0.3}
    groups = matrix_groups(model, head="2", matrix={"rule": "muon"}, element=element)
    by_role = {group["role"]: group for group in groups}
    assert by_role["matrix"]["rule"] == "muon"
    assert "lr" not in by_role["matrix"]
    for role, decay in (("embedding", 0.3), ("head", 0.3), ("vector", 0.0)):
        group = by_role[role]
        assert (group["rule"], group["lr"], group["weight_decay"]) == ("lion", 1e-4, decay)


def test_frozen_weights_stay_and_integers_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[1].codes = nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    groups = matrix_groups(model)
    assert taken(groups)["0.weight"] == "matrix"
    assert "1.codes" not in taken(groups)
    assert re.search(r"0\.weight \(frozen\)\n", repr(groups))
    assert repr(groups).endswith("left out, not floating-point: 1.codes")
    optimizer = MatrixOptimizer(groups, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"1.weight", "1.bias"}


def test_the_table():
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()),
        *(nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)),
    )
    expected = """
        6 parameters, 272 elements; head: 5.weight
        role    rule             taken as               shape          module  elements  parameter
        matrix  the optimizer's  4 x 9                  4 x 1 x 3 x 3  Conv2d  36        0.weight
        matrix  the optimizer's  4 x 18: group0, group1  4 x 2 x 3 x 3  Conv2d  72        1.weight
        matrix  the optimizer's  8 x 4                  8 x 4          Linear  32        3.weight
        matrix  the optimizer's  8 x 8                  8 x 8          Linear  64        4.weight
        head    adamw            elements               8 x 8          Linear  64        5.weight
        vector  adamw            elements               4              Conv2d  4         1.bias
    """
    groups = matrix_groups(model, head=model[5])

    def words(text):
        return [line.split() for line in text.strip().splitlines()]

    assert words(repr(groups)) == words(expected)
    MatrixOptimizer(groups, lr=0.1, rule="muon")  # leaves the groups as they are
    assert words(repr(groups)) == words(expected)
    with torch.device("meta"):
        twin = copy.deepcopy(model).to("meta")
    assert words(repr(matrix_groups(twin, head="5"))) == words(expected)


def test_equal_layers_share_a_line():
    layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(12))
    lines = repr(matrix_groups(nn.ModuleDict({"layers": layers}))).splitlines()
    assert len(lines) == 3
    assert lines[2].split()[-3:] == ["192", "layers.*.weight", "(12)"]


def test_wrappers_change_nothing():
    model = LanguageModel()
    expected = taken(matrix_groups(model, head="head", kinds={"body.0.weight": "embedding"}))
    checkpointed = copy.deepcopy(model)
    checkpointed.body[0] = checkpoint_wrapper(checkpointed.body[0])
    for wrapped in (
        nn.DataParallel(model),
        torch.compile(model, backend="eager"),
        nn.DataParallel(torch.compile(model, backend="eager")),
        checkpointed,
    ):
        groups = matrix_groups(wrapped, head="head", kinds={"body.0.weight": "embedding"})
        assert taken(groups) == expected


def groups_of_shards():
    torch.manual_seed(0)
    model = nn.Sequential(LanguageModel(), nn.Conv2d(2, 3, 3))
    whole = matrix_groups(model, head="0.head")
    text, kinds = repr(whole), taken(whole)
    fully_shard(model[0].body)
    fully_shard(model)
    sharded = matrix_groups(model, head="0.head")
    unknown = nn.Sequential(nn.ParameterList([torch.zeros(2, 2)]))
    fully_shard(unknown[0])
    with pytest.raises(ValueError, match=r"a ParameterList, .* kinds=\{ParameterList: ...\}"):
        matrix_groups(unknown)
    return repr(sharded) == text and taken(sharded) == kinds


def test_sharded_models_have_the_same_groups(pool):
    assert pool(2).run(groups_of_shards, timeout=30) == [True, True]


def test_a_partition_of_zero_3_is_told_by_its_whole_shape():
    model = nn.Linear(6, 4, bias=False)
    model.weight.data = torch.empty(0)
    model.weight.ds_shape = torch.Size((4, 6))
    groups = matrix_groups(model)
    assert taken(groups) == {"weight": "matrix"}
    assert "4 x 6" in repr(groups)


# --- what the optimizer makes of it


def update_of(weight, rule, **options):
    """What one step takes off a weight whose gradient is a fixed function of its place."""
    before = weight.detach().clone()
    MatrixOptimizer(options.pop("groups"), lr=0.1, rule=rule, compute_dtype=torch.float64).step()
    return before - weight.detach()


@pytest.mark.parametrize("rule", ["muon", "muon_spectral", "moonlight", "orscale_lm"])
def test_a_transposed_matrix_gets_the_transpose_of_the_update(rule):
    linear = nn.Linear(4, 18, bias=False, dtype=torch.float64)
    convolution = nn.ConvTranspose2d(4, 2, 3, bias=False, dtype=torch.float64)
    linear.weight.grad = torch.randn_like(linear.weight)
    with torch.no_grad():
        convolution.weight.copy_(linear.weight.T.reshape(4, 2, 3, 3))
    convolution.weight.grad = linear.weight.grad.T.reshape(4, 2, 3, 3).contiguous()
    one = update_of(linear.weight, rule, groups=matrix_groups(linear))
    other = update_of(convolution.weight, rule, groups=matrix_groups(convolution))
    torch.testing.assert_close(other.view(4, 18).T, one, rtol=1e-9, atol=1e-12)


def test_a_grouped_convolution_is_updated_as_separate_ones():
    grouped = nn.Conv2d(4, 6, 3, groups=2, bias=False, dtype=torch.float64)
    parts = nn.ModuleList(nn.Conv2d(2, 3, 3, bias=False, dtype=torch.float64) for _ in range(2))
    grouped.weight.grad = torch.randn_like(grouped.weight)
    with torch.no_grad():
        for part, weight, grad in zip(parts, grouped.weight.chunk(2), grouped.weight.grad.chunk(2)):
            part.weight.copy_(weight)
            part.weight.grad = grad.clone()
    together = update_of(grouped.weight, "orscale", groups=matrix_groups(grouped))
    before = torch.cat([part.weight.detach().clone() for part in parts])
    update_of(parts[0].weight, "orscale", groups=matrix_groups(parts))
    apart = before - torch.cat([part.weight.detach() for part in parts])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-12)
