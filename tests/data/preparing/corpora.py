"""A small corpus, a tokenizer that is the same with every version of every library, and what a data
set holds, for tests of preparing."""

import hashlib
import json
import random
from pathlib import Path

import yaml

WORDS = ["river", "stone", "market", "window", "lamp", "garden", "bread", "winter", "signal"]
SPACE = "\u0120"  # how byte-level tokenizers write a space


def write_corpus(folder: Path, documents: int = 240, files: int = 3) -> None:
    """`corpus_0.jsonl` …: short documents, some empty, some twice, in ASCII."""
    rng = random.Random(0)
    texts = [f"{i}: " + " ".join(rng.choices(WORDS, k=3 + i % 37)) for i in range(documents)]
    texts[5] = texts[-3] = ""
    texts[documents // 2] = texts[-1] = texts[2]
    for number in range(files):
        part = texts[number * documents // files : (number + 1) * documents // files]
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (folder / f"corpus_{number}.jsonl").write_text("".join(lines))


def write_tokenizer(path: Path) -> None:
    """A tokenizer.json: a token for each printable ASCII character, and a few pairs."""
    letters = [SPACE, *map(chr, range(33, 127))]
    pairs = [(SPACE, "s"), ("e", "r"), ("i", "n"), ("o", "w"), (SPACE + "s", "t")]
    pieces = [*letters, *(a + b for a, b in pairs), "<eos>"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(pieces) - 1,
                "content": "<eos>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in pairs],
        },
    }
    path.write_text(json.dumps(content))


def write_recipe(folder: Path, **changes: object) -> Path:
    """`recipe.yaml` of the corpus above; keys are replaced by `changes`."""
    recipe = {
        "name": "tiny",
        "sources": [{"kind": "jsonl", "path": "corpus_*.jsonl"}],
        "tokenizer": {"kind": "huggingface", "path": "tokenizer.json"},
        "validation": 0.1,
        "output": "data",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def hashes(directory: Path) -> dict[str, str]:
    """sha256 by name of all files, but for the manifest and the list of source files, which name
    paths and times."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("dataset.json", "sources.json")
    }
