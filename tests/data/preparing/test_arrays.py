"""Tables on disk: the bytes of NumPy, with errors that say why."""

import errno
import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from archscale.data.preparing import duplicates
from archscale.data.preparing.arrays import write_array
from archscale.data.preparing.encode import TABLE


@pytest.mark.parametrize("dtype", [TABLE, np.dtype("S16"), np.dtype(np.bool_)], ids=str)
@pytest.mark.parametrize("rows", [0, 3])
def test_arrays_are_written_as_numpy_does(dtype: np.dtype, rows: int) -> None:
    array = np.frombuffer(bytes(range(rows * dtype.itemsize)), dtype)
    ours, numpys = io.BytesIO(), io.BytesIO()
    write_array(ours, array)
    np.save(numpys, array)
    assert ours.getvalue() == numpys.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named() -> None:
    # The header is only buffered, so that writing the rows is what fails; closing fails again.
    with suppress(OSError), open("/dev/full", "wb") as file, pytest.raises(OSError) as caught:
        write_array(file, np.zeros(100_000, TABLE))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("total", [1, 5, 7])
def test_all_documents_are_kept_at_first(
    tmp_path: Path, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_BUCKET_ROWS", 5)
    path = tmp_path / "kept.npy"
    duplicates._write_true(path, total)
    assert np.load(path).tolist() == [True] * total
