"""Tasks of lm-eval from local files: one number by the command, through the export, by hand, and
while training."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from archscale.checkpoint.target import find_target
from archscale.errors import ConfigError
from archscale.evaluation.evaluate import Wanted, evaluate
from archscale.export.export import export
from archscale.inference.generate import Request, generate
from archscale.inference.sampling import Sampling
from archscale.inference.tasks import Tasks
from archscale.train.live import LiveEvaluation
from archscale.train.loading import load_model, load_text_model
from tests.commands import launch
from tests.evaluation.conftest import TASKS, documents
from tests.pool import pool
from tests.train.tiny import config, run

pytest.importorskip("lm_eval")


def scores(path: Path, folder: Path, **settings) -> dict[str, float]:
    wanted = Wanted(tasks=list(TASKS), task_folders=[folder], **settings)
    return {
        key: value
        for result in evaluate(path, wanted).results
        for key, value in result.metrics.items()
    }


def log_probability(target, model, given: list[int], following: list[int]) -> float:
    ids = [*given, *following][-target.config.model.context - 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    places = range(len(ids) - 1 - len(following), len(ids) - 1)
    return float(sum(logits[place, ids[place + 1]] for place in places))


def by_hand(run_dir: Path, folder: Path) -> dict[str, float]:
    """The same from the definitions: whole texts through the plain model, one by one."""
    target = find_target(run_dir)
    model, tokenizer = load_model(target), target.tokenizer
    right, nats, size = 0, 0.0, 0
    for document in documents():
        question = document["question"]
        given = [tokenizer.eos_id, *tokenizer.encode(question)]
        whole = [
            [tokenizer.eos_id, *tokenizer.encode(f"{question} {choice}")]
            for choice in document["choices"]
        ]
        found = [log_probability(target, model, given, ids[len(given) :]) for ids in whole]
        right += found.index(max(found)) == document["answer"]
        for first in range(0, len(given) - 1, 16):
            window = given[first : first + 17]
            nats -= log_probability(target, model, window[:1], window[1:])
        size += len(question.encode())
    count = len(documents())
    lines = (folder / "documents.jsonl").read_text().splitlines()
    answered = sum(json.loads(line)["written"] != "another" for line in lines)
    return {
        "eval/words/acc": right / count,
        "eval/spelling/exact_match": answered / count,
        "eval/whole/bits_per_byte": nats / size / math.log(2),
    }


def test_one_number_everywhere(trained: Path, task_folder: Path, tmp_path: Path) -> None:
    expected = by_hand(trained / "run", task_folder)
    assert 0 < expected["eval/words/acc"] < 1
    assert 0 < expected["eval/spelling/exact_match"] < 1
    own = scores(trained / "run", task_folder)
    assert own == pytest.approx(expected, rel=1e-5)
    assert scores(trained / "run", task_folder, batch_size=1) == pytest.approx(own, rel=1e-5)
    some = scores(trained / "run", task_folder, limit=2, fewshot=0)
    assert set(some) == {key.replace("/", "@k0n2/").replace("eval@k0n2", "eval") for key in own}
    out = tmp_path / "exported"
    export(trained / "run", out, dtype="float32", shard_size="5GB")
    assert scores(out, task_folder) == pytest.approx(own, rel=1e-5)
    # lm-eval's own way with models of transformers, which counts the first token of a text
    # otherwise where it scores it whole.
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(task_folder), include_defaults=False).load(["words"])
    results = harness(
        HFLM(pretrained=str(out), trust_remote_code=True, device="cpu"), loaded, log_samples=False
    )
    assert results["results"]["words"]["acc,none"] == own["eval/words/acc"]


def test_examples_where_a_task_says_none(
    trained: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a local group, whose task is one of lm-eval's own."""
    import lm_eval.tasks

    content = json.loads((task_folder / "words.yaml").read_text())
    content |= {"task": "alone", "num_fewshot": 0, "fewshot_split": "test"}
    (tmp_path / "local").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/alone.yaml").write_text(json.dumps(content))
    (tmp_path / "local/group.yaml").write_text(json.dumps({"group": "several", "task": ["alone"]}))
    folders: list = []

    class OwnTasks(lm_eval.tasks.TaskManager):  # the folder in place of lm-eval's own tasks
        def __init__(self, include_path=None, include_defaults=True):
            folders.append(include_defaults)
            include = [*include_path, *([str(tmp_path / "own")] if include_defaults else [])]
            super().__init__(include_path=include, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OwnTasks)
    for given, expected in ((None, 0), (2, 2)):
        wanted = Wanted(tasks=["several"], task_folders=[tmp_path / "local"], fewshot=given)
        results = evaluate(trained / "run", wanted).results
        (task,) = [result for result in results if result.name == "alone"]
        assert task.settings["examples"] == expected
    assert folders == [False, True] * 2


def trained_on_tasks(data: str, folder: str, run_dir: str, tasks: bool, **sections) -> list[dict]:
    names = [str(Path(folder, f"{name}.yaml")) for name in TASKS]
    told = {"tasks": names, "samples": ["abcd", ""]} if tasks else {}
    return run(config(data, steps=4, eval={"every": 2, **told}, **sections), run_dir)


def check_trained(trained: Path, task_folder: Path, run_dir: Path, lines: list[dict]) -> None:
    """Tasks and samples of a training are those of its checkpoint."""
    (newest,) = (run_dir / "checkpoints").iterdir()
    own = scores(newest, task_folder)
    assert {key: value for key, value in lines[-1].items() if key.startswith("eval/")} == (
        pytest.approx(own, rel=1e-5)
    )
    assert [key for key in lines[1] if key.startswith("eval/")] == list(own)
    assert not any(key.startswith("eval/") for key in lines[0])
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").open()]
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (2, "abcd"),
        (2, ""),
        (4, "abcd"),
        (4, ""),
    ]
    text = load_text_model(newest)
    requests = [Request(text.tokens(prompt), 64) for prompt in ("abcd", "")]
    written = generate(text.model, text.tokenizer, requests, Sampling(temperature=0.0))
    assert [row["text"] for row in samples[2:]] == [each.text for each in written]


def test_training_scores_them_and_does_not_change(
    trained: Path, task_folder: Path, tmp_path: Path
) -> None:
    """Losses are bitwise those of the run without them."""
    told = [str(trained / "tokens"), str(task_folder), str(tmp_path / "run"), True]
    lines = trained_on_tasks(*told)
    check_trained(trained, task_folder, tmp_path / "run", lines)
    plain = [json.loads(line) for line in (trained / "run/metrics.jsonl").open()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    assert lines[-1]["val_loss"] == plain[-1]["val_loss"]


def test_an_evaluation_that_is_left(
    trained: Path, task_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Asked before every pass; no random number is drawn, no bar is shown, and standard error stays
    what it was."""
    told = {"tasks": [str(task_folder / "words.yaml")], "samples": ["abcd"]}
    made = config(str(trained / "tokens"), eval=told).with_vocab(300)
    live = LiveEvaluation(made, torch.device("cpu"))
    model, stderr = load_model(find_target(trained / "run")), sys.stderr

    def forward(*args, **kwargs):
        assert sys.stderr is stderr  # where another thread may have to say something
        return model(*args, **kwargs)

    engine = SimpleNamespace(forward=forward)
    asked, before = itertools.count(), torch.get_rng_state()
    results = live.results(engine, lambda: next(asked) < 0)
    assert list(results.figures) == ["eval/words/acc"]
    assert not results.events
    assert capfd.readouterr().err == ""
    passes = next(asked)
    for number in (0, 1, passes - 1):  # in the tasks, and in the samples
        asked = itertools.count()
        assert live.results(engine, lambda: next(asked) == number) is None  # noqa: B023
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match=r"no such task file \(no\.yaml\): .*eval\.tasks"):
        LiveEvaluation(config("no", eval={"tasks": ["no.yaml"]}), torch.device("cpu"))


def test_a_task_that_cannot_be_scored(
    trained: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known before the first step where it can be; later it is left out alone."""
    content = json.loads((task_folder / "words.yaml").read_text())
    longer = {"task": "longer", "doc_to_choice": ["abcd " * 20, "no"], "doc_to_target": 0}
    (tmp_path / "longer.yaml").write_text(json.dumps(content | longer))
    told = [str(task_folder / "words.yaml"), str(tmp_path / "longer.yaml")]
    made = config(str(trained / "tokens"), eval={"tasks": told}).with_vocab(300)
    with pytest.raises(ConfigError, match=r"cannot score .*longer\.yaml: a text of \d+ tokens"):
        LiveEvaluation(made, torch.device("cpu"))
    monkeypatch.setattr(Tasks, "rehearse", lambda *told: None)
    live = LiveEvaluation(made, torch.device("cpu"))
    engine = SimpleNamespace(forward=load_model(find_target(trained / "run")))
    results = live.results(engine, lambda: False)
    assert list(results.figures) == ["eval/words/acc"]
    (event,) = results.events
    assert event.startswith(f"task left out: cannot score {tmp_path / 'longer.yaml'}: a text of")


def refused(folder: Path, tasks: Path) -> tuple[str, bool]:
    with pytest.raises(ConfigError) as caught:
        evaluate(folder, Wanted(tasks=["words"], task_folders=[tasks], limit=1))
    return caught.value.what, caught.value.on_every_rank


def test_an_error_of_all_ranks_is_told_once(
    trained: Path, task_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((task_folder / "words.yaml").read_text())
    longer = {"doc_to_choice": ["abcd " * 20, "no"], "doc_to_target": 0}
    (tmp_path / "words.yaml").write_text(json.dumps(content | longer))
    first, second = pool(2).run(refused, trained / "run", tmp_path)
    assert first == second
    assert "a text of" in first[0]
    assert first[1]


def diverged(data: str, folder: str, run_dir: str) -> list[dict]:
    sections = {
        "optimizer": {"matrix": {"rule": "muon"}, "weight_decay": 0.1},
        "telemetry": {"every": 1},
    }
    base = {"parameterization": {"base": {"lr": 1e38}}}
    return trained_on_tasks(data, folder, run_dir, True, **sections, **base)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_diverged_run_goes_on_without_figures(
    trained: Path, task_folder: Path, tmp_path: Path, world: int
) -> None:
    told = str(trained / "tokens"), str(task_folder), str(tmp_path / "run")
    lines = diverged(*told) if world == 1 else pool(world).run(diverged, *told)[0]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert not any(key.startswith("eval/") for line in lines for key in line)
    missing = "tasks and samples left out: the weights give logits that are not finite"
    assert [missing in (line.get("event") or "") for line in lines] == [False, True, False, True]
    assert "non-finite loss" in lines[-1]["event"]  # what the guard says stays


EXPERTS = {"moe": {"sparsity": 3, "top_k": 3}}
LAYOUTS = {  # name → (processes, sections of the config)
    "ddp2": (2, {"parallel": {"replicate": 2, "shard": 1}}),
    "fsdp3": (3, {"training": {"micro_batch": 8}}),
    "expert2": (2, {"parallel": {"expert": 2}, "model": EXPERTS}),
    "zero3": (2, {"parallel": {"engine": "deepspeed", "zero_stage": 3}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_many_processes_scores_them(
    trained: Path, task_folder: Path, tmp_path: Path, layout: str
) -> None:
    world, sections = LAYOUTS[layout]
    if layout == "zero3":
        pytest.importorskip("deepspeed")
    told = [str(trained / "tokens"), str(task_folder)]
    run_dirs = tmp_path / "with", tmp_path / "without"
    lines, plain = (
        pool(world).run(trained_on_tasks, *told, str(run_dir), tasks, **sections)[0]
        for run_dir, tasks in zip(run_dirs, (True, False))
    )
    check_trained(trained, task_folder, run_dirs[0], lines)
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]


@pytest.mark.slow
def test_two_processes_score_as_one(trained: Path, task_folder: Path) -> None:
    alone = scores(trained / "run", task_folder)
    assert pool(2).run(scores, trained / "run", task_folder) == [alone, alone]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launched_processes_score_as_one(trained: Path, task_folder: Path, launcher: str) -> None:
    """The command under both launchers; accelerate's `--multi_gpu` is what starts several."""
    alone = scores(trained / "run", task_folder)
    argv = ["eval", trained / "run", "--tasks", ",".join(TASKS), "--task-path", task_folder]
    if launcher == "torchrun":
        done = launch([*argv, "--json"], processes=2)
    else:
        told = ["--multi_gpu", "--num_processes=2", "--main_process_port=0", "-m", "archscale"]
        done = launch(
            ["launch", *told, *argv, "--json"], module="accelerate.commands.accelerate_cli"
        )
    results = json.loads(done.stdout)["results"]
    found = {
        f"eval/{result['name']}/{key}": value
        for result in results
        for key, value in result["figures"].items()
        if not key.endswith("_stderr")
    }
    assert found == alone
