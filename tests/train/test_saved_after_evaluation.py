"""A checkpoint that follows an evaluation holds the float32 weights, not what the evaluation
gathered of them in bfloat16."""

import torch

from archscale.checkpoint.difference import TensorReader
from archscale.files import step_directory
from tests.train.tiny import config, crash_after, run, tiny_data

BFLOAT16 = {"precision": "bf16"}


def straight_and_resumed(made, folder: str) -> tuple[list, list]:
    straight = run(made, f"{folder}/straight")
    crash_after(made, f"{folder}/crashed", 3)
    resumed = run(made, f"{folder}/crashed")
    return [line["loss"] for line in straight], [line["loss"] for line in resumed]


def test_weights_stay_float32(pool, tmp_path):
    """On two processes FSDP2 leaves the outermost weights gathered after a forward pass alone."""
    made = config(
        tiny_data(tmp_path),
        steps=4,
        training=BFLOAT16,
        eval={"every": 2, "batches": 1},
        checkpoint={"every": 2, "keep": 9},
    )
    for straight, resumed in pool(2).run(straight_and_resumed, made, str(tmp_path)):
        assert straight == resumed
    for step in (2, 4):
        reader = TensorReader(step_directory(tmp_path / "straight" / "checkpoints", step))
        dtypes = {name: entry.properties.dtype for name, entry in reader.tensors.items()}
        weights = {name: dtype for name, dtype in dtypes.items() if name.startswith("model.")}
        assert set(weights.values()) == {torch.float32}, weights
