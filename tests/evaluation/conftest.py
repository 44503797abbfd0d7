"""A run of two steps, and tasks of lm-eval over made-up words in local files."""

import json
from pathlib import Path

import numpy as np
import pytest

from archscale.inference.generate import Request, generate
from archscale.inference.sampling import Sampling
from archscale.train.loading import load_text_model
from tests.train.tiny import config, run, tiny_data

CHOICES = 3
TASKS = {
    "words": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "spelling": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["z"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set in `tokens` and a run on it in `run`, evaluated twice."""
    folder = tmp_path_factory.mktemp("evaluated")
    saved = {"every": 2, "keep": 2}
    made = config(tiny_data(folder), steps=4, checkpoint=saved, eval={"every": 2})
    run(made, str(folder / "run"))
    return folder


@pytest.fixture(scope="package")
def task_folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks and their documents, of which `documents` are the content. What the run writes itself
    is the right answer to those where it is UTF-8: other bytes are shown in many ways."""
    folder = tmp_path_factory.mktemp("tasks")
    model, content = load_text_model(trained / "run"), documents()
    asked = [Request(model.tokens(document["question"]), 3, ("z",)) for document in content]
    answers = generate(model.model, model.tokenizer, asked, Sampling(temperature=0.0))
    for document, answer in zip(content, answers):
        if "\ufffd" not in answer.text:
            document["written"] = answer.text
    (folder / "documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in content))
    for name, task in TASKS.items():
        files = {"test": str(folder / "documents.jsonl")}
        source = {"dataset_path": "json", "test_split": "test"}
        source["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))
    return folder


def documents() -> list[dict]:
    generator = np.random.default_rng(1)

    def word() -> str:
        return "".join(generator.choice(list("abcdefgh"), 4))

    return [
        {
            "question": " ".join(word() for _ in range(1 + number % 3)),
            "choices": [word() for _ in range(CHOICES)],
            "answer": int(generator.integers(CHOICES)),
            "written": "another",
        }
        for number in range(9)
    ]
