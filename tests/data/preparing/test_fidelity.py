"""What tokens of every make of tokenizer lose of a text is counted, said, and refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from archscale.data.preparing.fidelity import Fidelity
from archscale.data.tokenizer import Tokenizer
from archscale.errors import DataError
from tests.data.made_tokenizers import (
    gpt2,
    gpt2_joined,
    gpt2_lower,
    gpt2_prefixed,
    llama2_json,
    llama2_model,
    llama3,
    metaspace,
    nfkc_unigram,
    trained_here,
    without_bytes,
    wordpiece,
)

PLAIN = ["def parse(self, argument):\n    return argument\n" * 20, "another document, short"]
HARD = [f"Ünïcödé Text {i}: ﬁne  CAFÉ e\u0301 漢字 ½ Ⅳ\r\n\tTabs\n\n" * 6 for i in range(5)]


def measured(tokenizer: Tokenizer, texts: list[str]) -> Fidelity:
    fidelity = Fidelity()
    for text in texts:
        fidelity.add(text, len(text.encode()), tokenizer.encode_document(text), tokenizer)
    return fidelity


@pytest.mark.parametrize("make", [trained_here, gpt2])
def test_nothing_is_lost(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    fidelity = measured(make(tmp_path), PLAIN + HARD)
    assert fidelity.report() is None
    assert fidelity.lost_share == 0
    fidelity.refuse(lossy=False)


@pytest.mark.parametrize("make", [llama2_model, metaspace, llama2_json])
def test_a_space_before_each_document_loses_no_text(
    make: Callable[[Path], Tokenizer], tmp_path: Path
) -> None:
    fidelity = measured(make(tmp_path), PLAIN + HARD)
    assert fidelity.token_bytes == fidelity.text_bytes + len(PLAIN + HARD)
    assert fidelity.lost_share == 0
    assert "val_bits_per_byte is off by -0." in str(fidelity.report())
    fidelity.refuse(lossy=False)


@pytest.mark.parametrize("make", [without_bytes, nfkc_unigram, gpt2_lower, wordpiece])
def test_lost_text_is_said_and_refused(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    fidelity = measured(make(tmp_path), HARD)
    assert fidelity.lost_share > 0.05
    with pytest.raises(DataError, match=r"loses [\d.]+% of the text.*\(tokenizer\).*lossy: true"):
        fidelity.refuse(lossy=False)
    fidelity.refuse(lossy=True)


def test_a_little_is_only_said(tmp_path: Path) -> None:
    fidelity = measured(llama3(tmp_path), [*PLAIN, "e\u0301"])  # comes back as one character
    assert 0 < fidelity.lost_share < 0.01
    assert "loses 0." in str(fidelity.report())
    fidelity.refuse(lossy=False)
    (tmp_path / "prefixed").mkdir()
    prefixed = measured(gpt2_prefixed(tmp_path / "prefixed"), PLAIN)
    assert prefixed.lost_share == 0
    assert 0 < prefixed.blank_share < 0.01
    prefixed.refuse(lossy=False)


def test_line_breaks_of_prose_are_said_those_of_code_refused(tmp_path: Path) -> None:
    tokenizer = gpt2_joined(tmp_path)
    prose = measured(tokenizer, [("a line of prose has some seventy bytes or so, " * 2 + "\n") * 9])
    assert prose.lost_share == 0
    assert 0.01 < prose.blank_share < 0.02
    assert "white space, 1.1% of the text" in str(prose.report())
    prose.refuse(lossy=False)
    code = measured(tokenizer, ["if x:\n\ty = x\n\tz = 0\n" * 9])
    with pytest.raises(DataError, match="white space, 2.*% of the text"):
        code.refuse(lossy=False)
    code.refuse(lossy=True)


def test_nothing_at_all_comes_back(tmp_path: Path) -> None:
    fidelity = measured(wordpiece(tmp_path), ["漢字かな" * 9])
    assert fidelity.lost_share == 1
    assert "so there is no val_bits_per_byte" in str(fidelity.report())
    assert Fidelity().report() is None
    assert Fidelity().lost_share == 0


def test_same_length_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower case has as many bytes; only decoding shows the loss, whatever the size."""
    tokenizer = gpt2_lower(tmp_path)
    fidelity = measured(tokenizer, ["ABC " * 100_000])
    assert fidelity.token_bytes == fidelity.text_bytes
    assert fidelity.lost_share == pytest.approx(0.75)
    monkeypatch.setattr("archscale.data.preparing.fidelity._FIRST_BYTES", 160)
    many = measured(tokenizer, ["lower case"] * 16 + [f"UPPER {i}" for i in range(500)])
    assert many.changed_bytes > 0  # not only the first are decoded
    assert many.decoded_bytes < many.text_bytes / 4


def test_counts_add_up(tmp_path: Path) -> None:
    tokenizer = without_bytes(tmp_path)
    first, second, both = (measured(tokenizer, texts) for texts in (PLAIN, HARD, PLAIN + HARD))
    first.merge(Fidelity.from_json(second.to_json()))
    assert first == both


@pytest.mark.parametrize("make", [trained_here, gpt2, llama3, metaspace, llama2_json, llama2_model])
def test_token_bytes_are_those_of_the_text(
    make: Callable[[Path], Tokenizer], tmp_path: Path
) -> None:
    """Token by token: of ASCII, each decodes alone to as many bytes as it is said to have."""
    tokenizer = make(tmp_path)
    table = tokenizer.token_bytes()
    assert (table.dtype, table.shape) == (np.int32, (tokenizer.vocab_size,))
    start = tokenizer.encode("x")  # what comes first may lose a space that it was given
    for token in set(tokenizer.encode("x " + PLAIN[0])):
        alone = tokenizer.decode([*start, token])[1:]
        assert table[token] == len(alone.encode()), token
