"""DeepSpeed ZeRO 1, 2, 3 against one process: the same losses, the same
checkpoints."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from archscale.checkpoint.saving import Saver, load_checkpoint
from archscale.config import CheckpointConfig, dump_config
from archscale.data.training_data import open_training_data
from archscale.distributed import gather_objects, rank, world_size
from archscale.files import step_directory
from archscale.parallel import zero
from archscale.plan.plan import make_plan
from archscale.train import trainer
from tests.commands import MASTER_VARIABLES, RANK_VARIABLES, ROOT, Launched, launch
from tests.pool import WorkerError
from tests.pool import _free_port as free_port
from tests.train import test_parity
from tests.train.routing import smallest_gaps
from tests.train.test_moe import TIE
from tests.train.tiny import config, crash_after, losses, run, tiny_data

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (the extra `deepspeed`)",
)
STEPS = 50
TOLERANCE = 1e-5
MOE = {"sparsity": 4, "top_k": 3}
MODELS = {  # experts at a rate and a seed at which no token's routing flips (see test_moe.py)
    "dense": {},
    "experts": {"model": {"moe": MOE}, "parameterization": {"base": {"lr": 4e-4}}, "seed": 1},
}
LAYOUTS = {"fsdp2": (2, None), "zero1": (2, 1), "zero2": (2, 2), "zero3": (2, 3), "zero3x3": (3, 3)}
RULES = ("orscale_lm", "muonh", "muon")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def merge(*sections: dict) -> dict:
    merged: dict = {}
    for each in sections:
        for key, values in each.items():
            merged[key] = {**merged.get(key, {}), **values} if isinstance(values, dict) else values
    return merged


def stage_of(stage: int | None, **more) -> dict:
    return {"parallel": {"engine": "deepspeed", "zero_stage": stage, **more}} if stage else {}


def curves(
    data: str, folder: str, rule: str, sections: dict, steps: int = STEPS
) -> dict[str, list]:
    """Metrics by name; with experts also the smallest gap of this process's routing in each
    step."""
    with smallest_gaps() as gap:
        gaps, step = [], trainer.train_step

        def watched(*args, **kwargs):
            result = step(*args, **kwargs)
            gaps.append(gap[0])
            gap[0] = math.inf
            return result

        trainer.train_step = watched
        try:
            lines = run(config(data, rule, steps, **sections), folder)
        finally:
            trainer.train_step = step
    keys = ("loss", "moe/max_violation", "moe/load_entropy")
    found = {key: [line[key] for line in lines] for key in keys if key in lines[0]}
    return found | {"val": [lines[-1]["val_loss"]], "gap": gaps}


def furthest(found: dict[str, list], expected: dict[str, list]) -> float:
    """Largest relative difference of the losses, up to a near tie of routing after which the
    experts' loads differ (see `test_moe.assert_same`)."""
    assert found.keys() == expected.keys()
    a, b = (np.array([*curve["loss"], *curve["val"]]) for curve in (found, expected))
    end = len(a)
    if "moe/max_violation" in found:
        same = np.isclose(
            found["moe/load_entropy"], expected["moe/load_entropy"], rtol=1e-6, atol=0
        )
        if not same.all():
            end = int(np.argmin(same))
            assert expected["gap"][end] < TIE * (1 + end)
            np.testing.assert_allclose(a[end:], b[end:], rtol=1e-3)
    return float(np.max(np.abs(a[:end] / b[:end] - 1)))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Curves of one process by rule and model, each computed once."""
    found: dict[tuple, dict] = {}

    def get(rule: str, model: str) -> dict[str, list]:
        if (rule, model) not in found:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            found[rule, model] = curves(
                data, str(tmp_path_factory.mktemp("alone")), rule, MODELS[model]
            )
            torch.set_num_threads(threads)
        return found[rule, model]

    return get


# --- one trajectory

CASES = list(itertools.product(LAYOUTS, (1, 4), MODELS, RULES))
# each stage with either model and accumulation, rules in turn; FSDP2 is in other tests
PAIRWISE = [
    ("zero1", 1, "dense", "orscale_lm"),
    ("zero1", 4, "experts", "muonh"),
    ("zero2", 4, "experts", "orscale_lm"),
    ("zero2", 1, "dense", "muonh"),
    ("zero3", 4, "dense", "orscale_lm"),
    ("zero3", 1, "experts", "muonh"),
    ("zero3x3", 1, "experts", "orscale_lm"),
]


@pytest.mark.parametrize(
    ("layout", "accumulation", "model", "rule"),
    [pytest.param(*case, marks=[] if case in PAIRWISE else pytest.mark.slow) for case in CASES],
)
def test_the_losses_are_those_of_one_process(
    pool, data, alone, tmp_path, layout, accumulation, model, rule
):
    """Also 1 and 4 micro-batches."""
    world, stage = LAYOUTS[layout]
    training = {"training": {"micro_batch": 24 // world // accumulation}}
    sections = merge(MODELS[model], training, stage_of(stage))
    for found in pool(world).run(curves, data, str(tmp_path), rule, sections):
        assert furthest(found, alone(rule, model)) < TOLERANCE


OPTIONS = {
    "recomputed, untied": {
        "training": {"activation_checkpoint": "block"},
        "model": {"tied_embeddings": False},
    },
    "recomputed experts": {
        "training": {"activation_checkpoint": "block", "micro_batch": 3},
        "model": {"moe": MOE},
    },
    "masks, heads": {
        "data": {"document_mask": True, "packing": "best_fit"},
        "model": {"window": 5},
        "optimizer": {
            "matrix": {"rule": "orscale_lm", "per_head": True, "momentum_dtype": "bfloat16"}
        },
    },
    "no clipping": {"optimizer": {"matrix": {"rule": "orscale_lm"}, "grad_clip": None}},
    "growing batch": {
        "schedule": {"batch_ramp_tokens": 1536, "batch_ramp_stages": 2},
        "training": {"micro_batch": 2},
    },
    "adamw": {"optimizer": {"matrix": {"rule": "adamw"}}},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(pool, data, tmp_path, option):
    expected = losses(data, str(tmp_path / "one"), "orscale_lm", 8, **OPTIONS[option])
    stage = 2 + list(OPTIONS).index(option) % 2
    for curve in pool(2).run(
        losses,
        data,
        str(tmp_path / "two"),
        "orscale_lm",
        8,
        **merge(OPTIONS[option], stage_of(stage)),
    ):
        np.testing.assert_allclose(curve, expected, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_offloaded_state_trains_alike(pool, data, tmp_path, precision):
    """Accumulation 4: DeepSpeed keeps what it has accumulated on the host."""
    training = {"micro_batch": 3, "precision": precision}
    expected = losses(data, str(tmp_path / "one"), "orscale_lm", 8, training=training)
    for stage in (2, 3):
        sections = merge({"training": training}, stage_of(stage, offload_optimizer=True))
        for curve in pool(2).run(
            losses, data, str(tmp_path / str(stage)), "orscale_lm", 8, **sections
        ):
            np.testing.assert_allclose(curve, expected, rtol=1e-5 if precision == "fp32" else 5e-3)


def test_bf16_curves_agree_statistically(pool, data, tmp_path):
    bf16 = {"training": {"precision": "bf16"}}
    expected = losses(data, str(tmp_path / "one"), "orscale_lm", 10, **bf16)
    for stage in (1, 2, 3):
        sections = merge(bf16, stage_of(stage))
        for curve in pool(2).run(
            losses, data, str(tmp_path / str(stage)), "orscale_lm", 10, **sections
        ):
            np.testing.assert_allclose(curve, expected, rtol=5e-3)


def test_a_users_json_is_merged(pool, data, tmp_path):
    """Buckets so small that a gradient is reduced in several."""
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "reduce_bucket_size": 500,
                    "stage3_param_persistence_threshold": 0,
                }
            }
        )
    )
    expected = losses(data, str(tmp_path / "one"), "orscale_lm", 5)
    for stage in (1, 2, 3):
        sections = stage_of(stage, deepspeed=str(file))
        for curve in pool(2).run(
            losses, data, str(tmp_path / str(stage)), "orscale_lm", 5, **sections
        ):
            np.testing.assert_allclose(curve, expected, rtol=1e-5)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_telemetry_reads_the_same(pool, data, tmp_path, stage):
    sections = {"telemetry": {"every": 1, "per_layer": True, "spectrum_every": 2}}
    expected = run(config(data, "orscale_lm", 4, **sections), str(tmp_path / "one"))
    made = config(data, "orscale_lm", 4, **merge(sections, stage_of(stage)))
    for lines in pool(2).run(run, made, str(tmp_path / "two")):
        for line, wanted in zip(lines, expected, strict=True):
            assert line.keys() >= wanted.keys()  # with stragglers besides
            for key in wanted:
                if key.startswith(("stability/", "spectrum/", "optimizer/")):
                    assert line[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(
    ("stage", "content"),
    [
        (3, {"zero_optimization": {"stage3_max_live_paramters": 5}}),
        (2, {"zero_optimization": {"contiguous_gradients": "yess"}}),
        (2, {"bf16": {"bf16_master_weights_and_grads": True}}),
    ],
)
def test_what_deepspeed_refuses_of_a_users_json_is_one_line(pool, data, tmp_path, stage, content):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    with pytest.raises(WorkerError) as caught:
        pool(2).run(
            curves, data, str(tmp_path / "r"), "orscale_lm", stage_of(stage, deepspeed=str(file)), 2
        )
    assert caught.value.type_name == "ConfigError"
    assert "(parallel.deepspeed): " in str(caught.value)


# --- fragments, roles, updates


def build(data: str, stage: int | None, rule: str = "orscale_lm") -> trainer.Run:
    made = config(data, rule, 8, **stage_of(stage))
    read = open_training_data(made.data, made.model.context, made.seed)
    plan = make_plan(made.with_vocab(read.vocab_size), world_size=world_size())
    return trainer.Run(plan, Path("unused"), read, [], torch.device("cpu"))


def layout(data: str, stage: int) -> list[dict[str, tuple]]:
    """(shape, lo, hi) of every rank's fragments, and what the optimizer was told."""
    made = build(data, stage)
    weights = made.engine.weights()
    return gather_objects(
        {name: (w.shape, w.lo, w.lo + len(w.data)) for name, w in weights.items()}
    )


@pytest.mark.parametrize(("world", "stage"), [(2, 1), (2, 2), (2, 3), (3, 3)])
def test_partitions_cover_every_parameter_and_cut_matrices(pool, data, world, stage):
    ranks = pool(world).run(layout, data, stage)[0]
    cut = 0
    for name, (shape, *_) in ranks[0].items():
        pieces = sorted((lo, hi) for rank in ranks for _, lo, hi in [rank[name]] if lo < hi)
        assert pieces[0][0] == 0
        assert pieces[-1][1] == np.prod(shape)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
        cut += len(shape) == 2 and any(lo % shape[1] for lo, _ in pieces)  # within a row
    assert cut > 0
    assert any(len([1 for rank in ranks if rank[name][1] < rank[name][2]]) > 1 for name in ranks[0])


def count_orthogonalizations(data: str, folder: str, stage: int) -> int:
    original, counted = (
        test_parity.losses,
        lambda *args, **kwargs: losses(*args, **merge(kwargs, stage_of(stage))),
    )
    test_parity.losses = counted
    try:
        return test_parity.count_orthogonalizations(data, folder)
    finally:
        test_parity.losses = original


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_matrix_is_orthogonalized_once_a_step(pool, data, tmp_path, stage):
    """Matrices × steps at four micro-batches a step."""
    matrices = 2 * (4 + 1 + 2 + 1)
    assert sum(pool(2).run(count_orthogonalizations, data, str(tmp_path), stage)) == 5 * matrices


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_parameter_keeps_its_role(pool, data, tmp_path, stage):
    """Under `zero.Init` parameters are flat and empty when roles are assigned."""
    sections = merge({"model": {"tied_embeddings": False}}, stage_of(stage))
    pool(2).run(losses, data, str(tmp_path), "orscale_lm", 1, **sections)
    rows = json.loads((tmp_path / "manifest.json").read_text())
    found = "".join(
        f"{r['parameter']}  {r['role']}  {r['rule']}  {' '.join(r['matrices'])}".rstrip() + "\n"
        for r in rows
    )
    assert found == (Path(__file__).parent / "manifest.golden").read_text()


def nan_run(data: str, folder: str, stage: int, precision: str) -> list[dict]:
    """Step 3's gradient is NaN in one element, on the last rank."""
    original, taken = zero.clip_gradients, [0]

    def poisoned(grads, max_norm, group):
        taken[0] += 1
        if taken[0] == 3 and rank() == world_size() - 1:
            next(g for g in grads[::-1] if g.numel()).view(-1)[0] = float("nan")
        return original(grads, max_norm, group)

    zero.clip_gradients = poisoned
    try:
        return run(
            config(
                data,
                "orscale_lm",
                8,
                **merge({"training": {"precision": precision}}, stage_of(stage)),
            ),
            folder,
        )
    finally:
        zero.clip_gradients = original


def deep_nan_run(data: str, folder: str, stage: int, precision: str) -> list[dict]:
    """Step 3's loss is NaN on the last rank: DeepSpeed itself sees the gradients."""
    original, taken = zero.ZeroEngine.backward, [0]

    def poisoned(self, objective):
        taken[0] += 1
        original(
            self,
            (
                objective * float("nan")
                if taken[0] == 3 * 2 and rank() == world_size() - 1
                else objective
            ),
        )

    zero.ZeroEngine.backward = poisoned
    try:
        return run(
            config(
                data,
                "orscale_lm",
                8,
                **merge({"training": {"precision": precision}}, stage_of(stage)),
            ),
            folder,
        )
    finally:
        zero.ZeroEngine.backward = original


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_nan_gradient_does_not_reach_the_weights(pool, data, tmp_path, precision):
    for stage, poison in itertools.product((1, 2, 3), (nan_run, deep_nan_run)):
        folder = tmp_path / f"{stage}{poison.__name__}"
        for lines in pool(2).run(poison, data, str(folder), stage, precision):
            assert lines[2]["event"] == "non-finite grad_norm"
            assert [line["grad_norm"] is None for line in lines] == [
                line["step"] == 3 for line in lines
            ]
            assert all(line["loss"] is not None for line in lines)
            assert lines[-1]["loss"] < lines[0]["loss"]


def guarded_run(data: str, folder: str, stage: int) -> tuple[list[dict], list[float]]:
    """Step 3's loss is NaN on the last rank, under a guard that acts; its lines, and a checksum of
    bits after every step."""
    original, sums = zero.ZeroEngine.update, []

    def watched(self, optimizer, *args):
        norm = original(self, optimizer, *args)
        content = [w.data for w in self.weights().values()]
        content += [
            getattr(v, "data", v)
            for state in optimizer.fragments().values()
            for v in state.values()
        ]
        sums.append(sum(t.double().sum().item() for t in content))
        return norm

    backward, taken = zero.ZeroEngine.backward, [0]

    def poisoned(self, objective):
        taken[0] += 1
        backward(
            self,
            (
                objective * float("nan")
                if taken[0] == 3 * 2 and rank() == world_size() - 1
                else objective
            ),
        )

    zero.ZeroEngine.update, zero.ZeroEngine.backward = watched, poisoned
    try:
        guard = {"telemetry": {"every": 1, "guard": {"mode": "act"}}}
        return run(config(data, "orscale_lm", 5, **merge(guard, stage_of(stage))), folder), sums
    finally:
        zero.ZeroEngine.update, zero.ZeroEngine.backward = original, backward


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_a_guarded_step_leaves_the_state_untouched(pool, data, tmp_path, stage):
    for lines, sums in pool(2).run(guarded_run, data, str(tmp_path), stage):
        assert lines[2]["event"].startswith("skipped: non-finite grad_norm")
        assert [a == b for a, b in itertools.pairwise(sums)] == [False, True, False, False]


# --- checkpoints


@pytest.mark.parametrize("rule", ["orscale_lm", pytest.param("muonh", marks=pytest.mark.slow)])
def test_a_run_moves_between_engines(pool, data, tmp_path, rule):
    """ZeRO-3 on 2 → one native process → ZeRO-1 on 3 → FSDP2 on 2 → ZeRO-2 on 2."""
    every = {"checkpoint": {"every": 3}, "training": {"micro_batch": 4}}
    made = {
        stage: config(data, rule, 15, **merge(every, stage_of(stage))) for stage in (None, 1, 2, 3)
    }
    expected = run(made[None], str(tmp_path / "alone"))
    folder = str(tmp_path / "moving")
    pool(2).run(crash_after, made[3], folder, 3)
    crash_after(made[None], folder, 3)
    pool(3).run(crash_after, made[1], folder, 3)
    pool(2).run(crash_after, made[None], folder, 3)
    for lines in pool(2).run(run, made[2], folder):
        assert [line["step"] for line in lines] == list(range(1, 16))
        np.testing.assert_allclose(
            [line["loss"] for line in lines], [line["loss"] for line in expected], rtol=1e-5
        )


def resave(data: str, stage: int | None, rule: str, source: str, target: str) -> None:
    made = build(data, stage, rule)
    state = load_checkpoint(step_directory(Path(source), 2), made.engine.weights(), made.optimizer)
    made.engine.weights_changed()
    with Saver(Path(target), CheckpointConfig()) as saver:
        saver.save(made.engine.weights(), made.optimizer, {"step": 2, "config": state["config"]})


def content(folder: Path) -> dict[str, torch.Tensor]:
    path = step_directory(folder, 2)
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


@pytest.mark.parametrize("rule", ["orscale_lm", pytest.param("muonh", marks=pytest.mark.slow)])
def test_weights_momentum_c_and_radius_survive_bitwise(pool, data, tmp_path, rule):
    run(config(data, rule, 2), str(tmp_path / "run"))
    first = content(tmp_path / "run" / "checkpoints")
    assert any(name.endswith(".calibration") for name in first)
    folder = tmp_path / "run" / "checkpoints"
    for i, (world, stage) in enumerate([(2, 3), (3, 2), (2, None), (2, 1), (3, 3)]):
        target = tmp_path / str(i)
        pool(world).run(resave, data, stage, rule, str(folder), str(target))
        found, folder = content(target), target
        assert found.keys() == first.keys()
        for name, value in first.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_ten_steps_equal_five_and_a_crash_and_five_bitwise(pool, data, tmp_path, stage):
    folder = str(tmp_path)
    for straight, resumed in pool(2).run(straight_and_resumed, data, folder, stage):
        assert straight == resumed


def straight_and_resumed(data: str, folder: str, stage: int) -> tuple[list, list]:
    sections = merge({"checkpoint": {"every": 5}, "model": {"vocab_size": 317}}, stage_of(stage))
    made = config(data, "orscale_lm", 10, **sections)
    straight = run(made, folder + "/straight")
    crash_after(made, folder + "/crashed", 7)
    return [
        [(line["loss"], line["grad_norm"], line["lr"]) for line in lines]
        for lines in (straight, run(made, folder + "/crashed"))
    ]


# --- commands


@pytest.fixture
def yaml(data, tmp_path):
    dump_config(config(data, "orscale_lm", 3, **stage_of(2)), tmp_path / "c.yaml")
    return tmp_path / "c.yaml"


def losses_of(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def started_by(command: list, folder: Path, cwd: Path) -> list[float]:
    """Losses of `train` under another launcher, which is a script beside this Python or a module of
    it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES | MASTER_VARIABLES}
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    more = {
        "PATH": path,
        "PYTHONPATH": modules,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = Launched([*map(str, command), "--run-dir", str(folder)], own | more, cwd).wait(100)
    assert "Traceback" not in done.stderr
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    return losses_of(folder)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("hostfile", "no hostfile", "deepspeed", "accelerate")
    ],
)
def test_other_launchers_start_it(yaml, data, tmp_path, launcher):
    expected = losses(data, str(tmp_path / "alone"), "orscale_lm", 3)[:3]
    port, train = str(free_port()), ["archscale", "train", yaml]
    script = ["env", f"MASTER_PORT={port}", "bash", ROOT / "launch" / "deepspeed.sh", yaml]
    hosts = tmp_path / "hosts"
    hosts.write_text("# two processes here\nlocalhost slots=2\n")
    accelerate = [
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ]
    commands: dict[str, list] = {
        "hostfile": ["env", f"HOSTFILE={hosts}", "NODE_RANK=0", "MASTER_ADDR=127.0.0.1", *script],
        "no hostfile": ["env", "NPROC_PER_NODE=2", *script],
        "deepspeed": [
            "deepspeed",
            "--num_gpus=2",
            f"--master_port={port}",
            "--module",
            *train,
        ],  # with --local_rank
        "accelerate": [
            "accelerate",
            "launch",
            *accelerate,
            f"--main_process_port={port}",
            "--module",
            *train,
        ],
    }
    if launcher == "accelerate" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    np.testing.assert_allclose(
        started_by(commands[launcher], tmp_path / "r", tmp_path), expected, rtol=1e-5
    )


def test_torchrun_and_a_single_process_start_it(yaml, data, tmp_path):
    expected = losses(data, str(tmp_path / "alone"), "orscale_lm", 3)[:3]
    for processes in (1, 2):
        launch(
            ["train", yaml, "--run-dir", tmp_path / str(processes)],
            processes=processes,
            cwd=tmp_path,
        )
        np.testing.assert_allclose(losses_of(tmp_path / str(processes)), expected, rtol=1e-5)


def test_the_wrong_version_ends_in_one_line(yaml, tmp_path):
    """Before any process group starts, once for all ranks."""
    distribution = tmp_path / "other" / "deepspeed-0.15.0.dist-info"
    distribution.mkdir(parents=True)
    (distribution / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.15.0\n"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "other"), str(ROOT)])}
    done = launch(["train", yaml], processes=2, env=path, check=False, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("archscale:")]
    assert done.returncode != 0
    assert len(lines) == 1
    assert "deepspeed 0.15.0 is installed" in lines[0]


@pytest.mark.parametrize(
    ("hosts", "message"), [(None, "is no file"), ("node-a\n", "names no host")]
)
def test_a_wrong_hostfile_is_one_line(yaml, tmp_path, hosts, message):
    if hosts:
        (tmp_path / "hosts").write_text(hosts)
    command = ["bash", str(ROOT / "launch" / "deepspeed.sh"), str(yaml)]
    environment = os.environ | {
        "HOSTFILE": str(tmp_path / "hosts"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
