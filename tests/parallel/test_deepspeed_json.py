"""The generated DeepSpeed configuration, a user's own merged into it, and what is refused in one
line."""

import importlib.metadata
import json

import pytest

from archscale.config import Config
from archscale.errors import ConfigError
from archscale.parallel import zero
from archscale.parallel.deepspeed_json import merge, settings

OWN = settings(stage=2, bf16=True, micro_batch=4, offload=False, parameters=10**9)


def merged(tmp_path, theirs) -> dict:
    file = tmp_path / "theirs.json"
    file.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
    return merge(OWN, file)


def test_keys_are_added_and_equal_ones_and_auto_pass(tmp_path):
    theirs = {
        "wall_clock_breakdown": True,
        "gradient_clipping": "auto",
        "optimizer": None,
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 1000,
            "overlap_comm": True,
            "sub_group_size": "auto",
        },
        "train_batch_size": "auto",
        "comms_logger": {"enabled": True},
    }
    found = merged(tmp_path, theirs)
    zero_optimization = OWN["zero_optimization"] | {
        "reduce_bucket_size": 1000,
        "overlap_comm": True,
    }
    assert found == OWN | {
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
        "zero_optimization": zero_optimization,
    }
    assert merge(OWN, None) == OWN


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3 .* makes it 2"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 .* makes it 0.0"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true"),
        ({"bf16": False}, "bf16 is false"),
        ({"zero_optimization": {"sub_group_size": 10}}, "sub_group_size"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "parallel.offload_optimizer",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer .*: set the optimizer section"),
        (
            {"scheduler": {"type": "WarmupLR"}, "gradient_clipping": 1.0},
            "schedule section.*and 1 more problem",
        ),
        ("[1]", "holds no JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_what_contradicts_the_config_is_refused_by_key(tmp_path, theirs, message):
    with pytest.raises(ConfigError, match=message) as error:
        merged(tmp_path, theirs)
    assert "\n" not in str(error.value)
    assert "parallel.deepspeed" in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*nowhere.json: No such file"):
        merge(OWN, tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "version", ["0.18.9", "0.19.0", "0.19.7", "0.19.9", "0.20.0", "1.0", "0.20.1+cu12"]
)
def test_another_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(
        ConfigError, match=rf"deepspeed {version.split('+')[0]}.* is installed.*parallel.engine"
    ):
        zero.check_deepspeed()


def test_the_tested_versions_pass(monkeypatch):
    for version in ("0.19.8", "0.19.8.post1", "0.19.8+abc"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        zero.check_deepspeed()


def test_a_missing_deepspeed_is_one_line(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        ConfigError, match=r"deepspeed is not installed \(parallel.engine\): pip install"
    ):
        zero.check_deepspeed()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"engine": "deepspeed", "expert": 2, "shard": 2},
            "experts cannot be spread .*parallel.expert",
        ),
        ({"engine": "deepspeed", "replicate": 2}, "parallel.replicate"),
        ({"engine": "deepspeed", "reshard_after_forward": False}, "parallel.reshard_after_forward"),
        ({"engine": "deepspeed", "offload_optimizer": True}, "parallel.offload_optimizer.*2 or 3"),
        ({"offload_optimizer": True}, "means nothing to the native engine"),
        ({"deepspeed": "ds.json"}, "means nothing to the native engine"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(section, message):
    with pytest.raises(ConfigError, match=message) as error:
        Config.from_dict({"name": "r", "data": {"train": "d"}, "parallel": section})
    assert "\n" not in str(error.value)


def test_fp16_is_refused():
    with pytest.raises(ConfigError, match="training.precision"):
        Config.from_dict(
            {
                "name": "r",
                "data": {"train": "d"},
                "parallel": {"engine": "deepspeed"},
                "training": {"precision": "fp16"},
            }
        )
