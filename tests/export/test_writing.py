"""What an export writes, and what it refuses; nothing here is loaded by transformers."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from archscale.checkpoint.directory import read_state, recorded_files, state_text
from archscale.checkpoint.reading import StoredWeights
from archscale.checkpoint.target import find_target
from archscale.cli import app
from archscale.errors import ArchscaleError, CheckpointError, ConfigError
from archscale.export import export as command
from archscale.export.export import CODE, export, push
from archscale.export.safetensors_files import size_in_bytes
from archscale.files import CHECKPOINTS
from archscale.huggingface.architecture import choose
from archscale.train.loading import load_model
from tests.export.runs import STEP, make_run
from tests.pool import pool
from tests.train import tiny
from tests.train.tiny import config, tiny_data

load_file = pytest.importorskip("safetensors.torch").load_file
pytest.importorskip("tokenizers")
STEP_NAME = f"step_{STEP:08d}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a vocabulary larger than its tokenizer's."""
    return make_run(data, tmp_path_factory.mktemp("made") / "run", model={"vocab_size": 304})


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "run")


def change_state(run_dir: Path, **values: object) -> None:
    """Write a valid `state.json` that says something else; what is None goes."""
    checkpoint = run_dir / CHECKPOINTS / STEP_NAME
    state = read_state(checkpoint) | values
    state = {key: value for key, value in state.items() if value is not None and key != "crc32"}
    text = state_text(state, recorded_files(state), 1)
    (checkpoint / "state.json").write_text(text)


def test_the_command_says_what_it_chose(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = CliRunner().invoke(app, ["export", str(made), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.split(": ", 1)[1] == (
        "step 7 as ArchscaleForCausalLM, own code: no class of transformers has a gate on every"
        " head; float32, 1 file\n"
    )
    files = {path.name for path in out.iterdir()}
    assert files == {
        "config.json",
        "configuration_archscale.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_archscale.py",
        "README.md",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert {path.stat().st_mode for path in out.iterdir()} == {(out / "README.md").stat().st_mode}
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [300, 301, 302, 303]
    assert generation["eos_token_id"] == generation["bos_token_id"] == 1
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for fact in (
        "trust_remote_code=True",
        "step 7: 2,688 tokens of 3,840 planned",
        "data: tokens\n",
        "validation loss, nats per token: 3.5000",
        "matrix: muonh, peak learning rate 0.003",
        "attention scale into `q_norm` or `q_proj`: 4",
    ):
        assert fact in card


def test_the_card_says_whose_weights_they_are(run_dir: Path, tmp_path: Path) -> None:
    named = [{"step": step, "run": "tiny"} for step in (5, STEP)]
    change_state(
        run_dir,
        averaged=named,
        initialized_from={"path": "/secret/Some", "model_type": "qwen3"},
    )
    export(run_dir, tmp_path / "mean", shard_size="5GB")
    mean = (tmp_path / "mean" / "README.md").read_text()
    assert "step 7: 2,688 tokens of 3,840 planned" in mean
    assert "the mean of the weights of 2 checkpoints: step 5 of tiny, step 7 of tiny" in mean
    assert "training began with the weights of Qwen3ForCausalLM in Some\n" in mean
    assert "secret" not in mean
    assert "3.5000" not in mean  # a loss of the newest one's weights

    change_state(run_dir, averaged=None, initialized_from={"path": "/a", "run": "b", "step": 2})
    aside = run_dir / "abandoned" / "after_step_00000001"
    shutil.move(run_dir / CHECKPOINTS / STEP_NAME, aside / STEP_NAME)
    line = {"step": STEP, "tokens": 1, "loss": 3.25, "val_loss": 3.75}
    (aside / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    export(aside / STEP_NAME, tmp_path / "aside", shard_size="5GB")
    card = (tmp_path / "aside" / "README.md").read_text()
    assert "validation loss, nats per token: 3.7500" in card
    assert "training began with the weights of step 2 of b\n" in card


def test_a_checkpoint_by_name_is_the_newest_one_of_its_run(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "a", shard_size="5GB")
    (tmp_path / "b").mkdir()  # an empty directory will do
    export(made / CHECKPOINTS / STEP_NAME, tmp_path / "b", dtype="bfloat16", shard_size="5GB")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert torch.equal(weight.bfloat16(), b[name])


def test_checkpoints_behind_links_belong_to_the_run_that_names_them(
    run_dir: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "scratch" / "of_the_run"
    elsewhere.parent.mkdir()
    (run_dir / CHECKPOINTS).rename(elsewhere)
    (run_dir / CHECKPOINTS).symlink_to(elsewhere)
    assert find_target(run_dir / CHECKPOINTS / STEP_NAME).run_dir == run_dir
    # A link to a checkpoint from outside of any run.
    (run_dir / CHECKPOINTS).unlink()
    elsewhere.rename(run_dir / CHECKPOINTS)
    (tmp_path / "best").symlink_to(run_dir / CHECKPOINTS / STEP_NAME)
    assert find_target(tmp_path / "best").run_dir == run_dir


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_checkpoints_in_another_place_are_found(scheme, run_dir, made, tmp_path):
    if scheme:
        pytest.importorskip("fsspec")
    (run_dir / CHECKPOINTS).rename(tmp_path / "elsewhere")
    path = run_dir / "config.yaml"
    text = path.read_text()
    assert text.count("directory: null") == 1
    path.write_text(text.replace("directory: null", f"directory: {scheme}{tmp_path}/elsewhere"))
    for target, name in ((run_dir, "a"), (made, "b")):
        export(target, tmp_path / name, shard_size="5GB")
    here, there = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert here == there


def refusal(target: Path, out: Path, shard_size: str = "5GB") -> ArchscaleError:
    before = sorted(path.name for path in out.parent.iterdir())
    with pytest.raises(ArchscaleError) as caught:
        export(target, out, shard_size=shard_size)
    assert sorted(path.name for path in out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_is_no_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "missing", run_dir / CHECKPOINTS):
        assert "no run with a whole checkpoint" in str(refusal(target, tmp_path / "out"))
    shutil.rmtree(run_dir / CHECKPOINTS / STEP_NAME)
    assert "no run with a whole checkpoint" in str(refusal(run_dir, tmp_path / "out"))
    (run_dir / CHECKPOINTS / "step_00000009").mkdir()
    (run_dir / CHECKPOINTS / "step_00000009" / "state.json").write_text("{}")
    foreign = refusal(run_dir / CHECKPOINTS / "step_00000009", tmp_path / "out")
    assert "format None" in str(foreign)


def test_a_damaged_checkpoint_is_refused(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / CHECKPOINTS / STEP_NAME
    (checkpoint / "__0_0.distcp").write_bytes(b"short")
    problem = "damaged: __0_0.distcp is truncated: 5 bytes"
    assert problem in str(refusal(checkpoint, tmp_path / "out"))


def test_one_wrong_byte_is_found(run_dir: Path, tmp_path: Path) -> None:
    for name in (".metadata", "__0_0.distcp"):
        path = run_dir / CHECKPOINTS / STEP_NAME / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert f"damaged: {name} has the checksum" in str(refusal(run_dir, tmp_path / "out"))
        path.write_bytes(whole)


@pytest.mark.parametrize("key", ["step", "config", "data"])
def test_a_state_that_says_too_little_is_refused(key, run_dir, tmp_path):
    change_state(run_dir, **{key: None})
    assert f"damaged: state.json has no {key}" in str(refusal(run_dir, tmp_path / "out"))


def test_damage_that_no_checksum_shows_is_one_error(run_dir: Path) -> None:
    """As in checkpoints that were written without any."""
    checkpoint = run_dir / CHECKPOINTS / STEP_NAME
    whole = (checkpoint / ".metadata").read_bytes()
    messages = []
    for position in range(0, len(whole), 97):
        changed = whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :]
        (checkpoint / ".metadata").write_bytes(changed)
        try:
            StoredWeights(checkpoint)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)


def test_weights_of_another_shape_are_refused(run_dir: Path, tmp_path: Path) -> None:
    state = read_state(run_dir / CHECKPOINTS / STEP_NAME)
    state["config"]["model"]["vocab_size"] = 300
    change_state(run_dir, config=state["config"])
    shape = "embedding.weight: (304, 24) in the checkpoint, (300, 24) by its config"
    assert shape in str(refusal(run_dir, tmp_path / "out"))


def test_a_config_that_was_edited_later_changes_nothing(run_dir: Path, tmp_path: Path) -> None:
    """The weights belong to the config that their checkpoint was written with."""
    export(run_dir, tmp_path / "before", shard_size="5GB")
    path = run_dir / "config.yaml"
    edited = re.sub(r"rope_theta: \S+", "rope_theta: 77777.0", path.read_text())
    edited = re.sub(r"vocab_size: \d+", "vocab_size: 300", edited)
    edited = re.sub(r"window: null", "window: 3", edited)
    assert "77777" in edited
    assert "window: 3" in edited
    path.write_text(edited)
    export(run_dir, tmp_path / "after", shard_size="5GB")
    before, after = (sorted((tmp_path / name).iterdir()) for name in ("before", "after"))
    assert [path.name for path in before] == [path.name for path in after]
    for first, second in zip(before, after, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_a_directory_in_use_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "new or an empty directory" in str(refusal(made, tmp_path / "out"))
    assert "new or an empty directory" in str(refusal(made, tmp_path / "out" / "mine"))
    with pytest.raises(ConfigError, match="cannot write the export"):
        export(made, tmp_path / "out" / "mine" / "below", shard_size="5GB")


def test_an_empty_directory_stays_the_one_it_is(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a mount point, or where the shell is, or in a place that cannot be written to."""
    there = tmp_path / "place" / "there"
    there.mkdir(parents=True)
    (tmp_path / "link").symlink_to(there)
    number = there.stat().st_ino
    replace = os.replace

    def refuse_directories(source: Path, target: Path) -> None:
        assert not Path(source).is_dir()
        assert Path(target).name != "config.json" or len(list(there.iterdir())) == 9
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse_directories)
    monkeypatch.chdir(there)
    pushed: list[Path] = []
    monkeypatch.setattr(
        "archscale.export.export.push", lambda path, name: pushed.append(path) or "address"
    )
    for out in (".", "../../link"):
        there.parent.chmod(0o500)
        arguments = ["export", str(made), "--out", out, "--push", "me/tiny"]
        done = CliRunner().invoke(app, arguments)
        there.parent.chmod(0o700)
        assert done.exit_code == 0, done.output
        assert pushed.pop() == there
        assert there.stat().st_ino == number
        names = sorted(path.name for path in there.iterdir())
        assert len(names) == 9
        assert "config.json" in names
        for path in there.iterdir():
            path.unlink()
    assert (tmp_path / "link").is_symlink()


def test_nothing_is_left_of_an_export_that_sigterm_ends(made, tmp_path, monkeypatch):
    """Nor of the folders that were made on the way to it; status 143, as without a handler."""
    handler = signal.getsignal(signal.SIGTERM)

    def ended(*_: object) -> None:
        assert [path.name for path in (tmp_path / "new" / "deeper").iterdir()]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("archscale.export.export.write_weights", ended)
    done = CliRunner().invoke(app, ["export", str(made), "--out", f"{tmp_path}/new/deeper/out"])
    assert done.exit_code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_was_moved_aside_can_be_exported(run_dir, tmp_path):
    aside = run_dir / "abandoned" / "after_step_00000003" / STEP_NAME
    aside.parent.mkdir(parents=True)
    (run_dir / CHECKPOINTS / STEP_NAME).rename(aside)
    assert find_target(aside).run_dir == run_dir


@pytest.mark.parametrize(
    ("line", "train", "said"),
    [
        ({"loss": None, "val_loss": math.nan}, "https://me:key@host/web?token=secret", "data: web"),
        ({"loss": None}, "s3://bucket/folder/web#secret", "data: web"),
    ],
)
def test_the_card_says_no_secrets_and_what_was_not_finite(line, train, said, run_dir, tmp_path):
    path = run_dir / "metrics.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | line) + "\n")
    checkpoint = run_dir / CHECKPOINTS / STEP_NAME
    there = read_state(checkpoint)["config"]
    change_state(run_dir, config=there | {"data": there["data"] | {"train": train}})
    export(run_dir, tmp_path / "out", shard_size="5GB")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- {said}\n" in card
    assert "training loss of that step, nats per token: not finite" in card
    assert not re.search("secret|key@", card)
    assert "nan" not in card


def test_a_failure_leaves_an_empty_directory_empty(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail_at_last(source: Path, target: Path) -> None:
        if Path(target).name == "config.json":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail_at_last)
    (tmp_path / "out").mkdir()
    assert "cannot write the export: Input/output" in str(refusal(made, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_a_diverged_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    change_state(run_dir, not_finite_since=5)
    assert "not finite since step 5" in str(refusal(run_dir, tmp_path / "out"))


def test_weights_that_are_not_finite_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = StoredWeights.read

    def read(self: StoredWeights, name: str) -> torch.Tensor:
        weight = whole(self, name)
        return weight.fill_(torch.nan) if name == "head.norm.weight" else weight

    monkeypatch.setattr(StoredWeights, "read", read)
    assert "head.norm.weight is not finite" in str(refusal(made, tmp_path / "out"))


def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch):
    package = pytest.importorskip("safetensors")

    def save_file(held, path, **options):
        path.write_bytes(b"half")
        raise package.SafetensorError("Error while serializing:\nNo space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    assert "cannot write the export: Error while" in str(refusal(made, tmp_path / "out"))


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_a_missing_package_is_named_with_its_remedy(package, made, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert "pip install archscale[export]" in str(refusal(made, tmp_path / "out"))


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0kB", "5 gigabytes", "nanGB", "infGB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="is not a size"):
        size_in_bytes(text)


def test_sizes():
    assert [size_in_bytes(text) for text in ("5GB", "500 MB", "1.5kb")] == [5e9, 5e8, 1500]


@pytest.mark.parametrize(
    ("model", "obstacles"),
    [
        ({"gated_attention": False, "moe": {}}, 2),
        ({"gated_attention": True, "mlp": "relu2"}, 2),
        ({"gated_attention": False, "mlp": "relu2", "qk_norm": False, "window": 4}, 1),
        ({"gated_attention": False, "moe": {"shared_expert": False}}, 1),
        # The square root of the gate of one expert is 1.
        ({"gated_attention": False, "moe": {"shared_expert": False, "top_k": 1}}, 0),
    ],
)
def test_what_no_stock_class_has(data, model, obstacles):
    assert len(choose(config(data, model=model).model).obstacles) == obstacles


def test_the_code_beside_the_weights_imports_torch_and_transformers_only():
    for name in CODE:
        tree = ast.parse((Path(command.__file__).parent / name).read_text())
        names = {
            str(node.module if isinstance(node, ast.ImportFrom) else alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        imported = {name.split(".")[0] for name in names}
        assert imported <= {"torch", "transformers", "configuration_archscale"}


def test_the_hub_gets_the_directory_in_a_private_repository(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, dict]] = []

    class Stub:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))
            if repo_id == "bad//name":
                raise ValueError("Repo id must be\nof another form")
            return f"https://hub/{repo_id}"

        def upload_folder(self, **options):
            calls.append(("upload", options))

    monkeypatch.setattr(hub, "HfApi", Stub)
    assert push(tmp_path, "me/tiny") == "https://hub/me/tiny"
    assert calls == [
        ("me/tiny", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/tiny", "folder_path": tmp_path}),
    ]
    with pytest.raises(ConfigError, match=r"did not take it: Repo id must be \(--push"):
        push(tmp_path, "bad//name")


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_read_whole(data, tmp_path):
    run_dir = tmp_path / "run"
    sections = {"model": {"moe": {"sparsity": 3, "top_k": 3}}, "parallel": {"expert": 2}}
    trained = config(data, steps=1, **sections)
    pool(2).run(tiny.run, trained, str(run_dir), timeout=120)
    assert len(list(run_dir.glob(f"{CHECKPOINTS}/*/*.distcp"))) == 2
    export(run_dir, tmp_path / "out", shard_size="5GB")
    weights = load_file(tmp_path / "out/model.safetensors")
    native = dict(load_model(find_target(run_dir)).named_parameters())
    theirs = "model.layers.1"
    assert torch.equal(weights["model.embed_tokens.weight"], native["embedding.weight"])
    ours = native["blocks.1.mlp.experts.up.weight"]  # (E, 2 F, D)
    for expert in range(len(ours)):
        for name, part in zip(("gate_proj", "up_proj"), ours[expert].chunk(2)):
            assert torch.equal(weights[f"{theirs}.mlp.experts.{expert}.{name}.weight"], part)
    values = native["blocks.1.attention.qkv.weight"][32:40]  # after 3 heads and 1 of 8 rows
    assert torch.equal(weights[f"{theirs}.self_attn.v_proj.weight"], values)


def test_why_a_checkpoint_cannot_be_read(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read the weights: No such file"):
        StoredWeights(tmp_path)
    checkpoint = run_dir / CHECKPOINTS / STEP_NAME
    stored = StoredWeights(checkpoint)
    (checkpoint / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError) as caught:  # what DCP wraps, with a traceback in its text
        stored.read("head.norm.weight")
    assert caught.value.what == "cannot read the weights: No such file or directory"
