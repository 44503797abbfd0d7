"""`archscale eval`: the run's own validation, and any text, by definition and by the command."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from archscale.checkpoint.target import find_target
from archscale.data.split import TokenSplit
from archscale.evaluation.evaluate import Wanted, evaluate
from archscale.evaluation.results import Evaluated
from archscale.export.export import export
from archscale.inference.exported import load_exported
from archscale.train.loading import load_model
from tests.pool import pool
from tests.train.tiny import config, run

CONTEXT = 16  # of the tiny model


def lines(run: Path) -> dict[int, dict]:
    return {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").open())}


def figures(evaluated: Evaluated) -> list[dict]:
    return [dict(result.figures) for result in evaluated.results]


@pytest.mark.parametrize(("name", "step"), [("", 4), ("checkpoints/step_00000002", 2)])
def test_the_runs_own_validation_again(trained: Path, name: str, step: int) -> None:
    """Bitwise: one process, nothing compiled, the same windows in the same batches."""
    evaluated = evaluate(trained / "run" / name, Wanted())
    written = lines(trained / "run")[step]
    assert evaluated.step == step
    assert figures(evaluated) == [{key: written[key] for key in ("val_loss", "val_bits_per_byte")}]
    assert evaluated.results[0].recorded == evaluated.results[0].figures
    (alone,) = evaluate(trained / "run" / name, Wanted(batch_size=1)).results
    # Sums of the same losses, in batches of another size.
    assert alone.figures == pytest.approx(evaluated.results[0].figures, rel=1e-6)


@pytest.mark.parametrize("stride", [16, 5])
def test_a_text_by_definition(trained: Path, stride: int) -> None:
    path = trained / "text/000.txt"
    (result,) = evaluate(trained / "run", Wanted(texts=[path], stride=stride)).results
    target = find_target(trained / "run")
    model = load_model(target)
    ids = [target.tokenizer.eos_id, *target.tokenizer.encode(path.read_text())]
    nats = 0.0
    with torch.no_grad():
        for place in range(1, len(ids)):
            window = (place - 1) // stride
            first = max(0, (window + 1) * stride - CONTEXT)
            logits = model(torch.tensor([ids[first:place]])).logits[0, -1]
            nats -= float(logits.log_softmax(0)[ids[place]])
    assert result.settings["tokens"] == len(ids) - 1
    # Batched products in float32 beside those of one row: some 1e-6 of each loss.
    assert result.figures["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    bits = nats / math.log(2) / path.stat().st_size
    assert result.figures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    mean = result.figures["nats_per_token"]
    assert result.figures["perplexity"] == math.exp(mean)


def test_data_are_read_to_their_last_token(trained: Path) -> None:
    data = str(trained / "tokens")
    wanted = Wanted(data=[data], contexts=[CONTEXT, 8])
    first, second = evaluate(trained / "run", wanted).results
    split = TokenSplit(data, "validation", CONTEXT)
    assert first.settings["tokens"] == second.settings["tokens"] == split.num_tokens - 1
    ids = split.tokens(1, split.num_tokens)
    assert first.settings["bytes"] == int(split.token_bytes[ids].sum())
    label = next(iter(first.metrics)).split("/")[1]
    assert label.startswith("tokens-")
    assert list(second.metrics) == [f"eval/{label}@8/{key}" for key in second.figures]
    (cut,) = evaluate(trained / "run", Wanted(data=[data], most_tokens=48)).results
    assert cut.settings["tokens"] == 48
    assert list(cut.metrics) == [f"eval/{label}@n48/{key}" for key in cut.figures]
    # Whole windows alone, as validation in training counts them.
    model = load_model(find_target(trained / "run"))
    block = torch.from_numpy(split.samples([0, 1, 2]))
    with torch.no_grad():
        nats = model(block[:, :-1], block[:, 1:]).loss / 48
    assert cut.figures["nats_per_token"] == pytest.approx(float(nats), rel=1e-5)


def test_a_part_of_a_text(trained: Path, tmp_path: Path) -> None:
    """Files of one name have names of their own among the metrics."""
    names = set()
    for folder, text in (("a", "abcd efgh abcd"), ("b", "efgh abcd efgh")):
        path = tmp_path / folder / "test.txt"
        path.parent.mkdir()
        path.write_text(text)
        (result,) = evaluate(trained / "run", Wanted(texts=[path], most_tokens=3)).results
        ids = find_target(trained / "run").tokenizer.encode(text)[:3]
        read = find_target(trained / "run").tokenizer.decode(ids)
        assert (result.settings["tokens"], result.settings["bytes"]) == (3, len(read))
        names |= set(result.metrics)
        assert all("@n3/" in name for name in result.metrics)
    assert len(names) == 2 * len(result.metrics)


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "model"
    export(trained / "run", out, dtype="float32", shard_size="5GB")
    return out


def test_an_export_has_the_same_figures(trained: Path, exported: Path) -> None:
    wanted = Wanted([str(trained / "tokens")], [trained / "text/000.txt"], most_tokens=200)
    native, theirs = evaluate(trained / "run", wanted), evaluate(exported, wanted)
    assert theirs.run_dir is None
    for mine, other in zip(figures(native), figures(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)  # logits are equal to 2e-5


def test_a_model_of_another_project(trained: Path, exported: Path, tmp_path: Path) -> None:
    """Its config has other names, its tokenizer pads and cuts, and one file says null."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    sizes = {"n_positions": 24, "n_embd": 8, "n_layer": 1, "n_head": 1}
    config = transformers.GPT2Config(vocab_size=300, bos_token_id=7, eos_token_id=9, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    nothing = {"bos_token_id": None, "eos_token_id": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(nothing))
    tokenizer = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    usual = tuple(tokenizer.encode("").ids)
    tokenizer.enable_padding(length=len(usual) + 8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = load_exported(tmp_path)
    assert (text.before, text.model.context, text.ends) == (usual, 24, {9})
    assert text.empty == (usual or (7,))
    (result,) = evaluate(tmp_path, Wanted(texts=[trained / "text/000.txt"])).results
    assert result.settings["context"] == 24


def evaluated_in_pool(run: str, data: str, text: str) -> tuple[list[dict], list[dict]]:
    wanted = Wanted([data], [Path(text)], contexts=[CONTEXT, 8])
    return figures(evaluate(Path(run), Wanted())), figures(evaluate(Path(run), wanted))


def test_two_processes_equal_one(trained: Path) -> None:
    where = [str(trained / part) for part in ("run", "tokens", "text/001.txt")]
    own, texts = evaluated_in_pool(*where)
    for mine, theirs in pool(2).run(evaluated_in_pool, *where):
        assert theirs == texts  # the same batches, whose sums are added exactly
        assert theirs is not texts
        assert mine[0] == pytest.approx(own[0], rel=1e-6)


def test_what_is_abandoned_takes_its_evaluations_along(trained: Path, tmp_path: Path) -> None:
    """Step 4 then has other weights."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained / "run", run_dir)
    older = run_dir / "checkpoints/step_00000002"
    wanted = Wanted(texts=[trained / "text/000.txt"])
    for target in (run_dir, older):
        evaluate(target, wanted).keep()
    made = config(str(trained / "tokens"), steps=4, checkpoint={"every": 2}, eval={"every": 2})
    run(made, str(run_dir), str(older))
    (aside,) = (run_dir / "abandoned").iterdir()
    for folder, step in ((run_dir, 2), (aside, 4)):
        (line,) = (folder / "evaluations.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == step
    (left,) = aside.glob("step_*")
    evaluated = evaluate(left, Wanted())
    evaluated.keep()  # nowhere: step 4 of the run is another
    assert (evaluated.step, evaluated.results[0].recorded) == (4, {})
    assert len((run_dir / "evaluations.jsonl").read_text().splitlines()) == 1
