""".npy files, written so that an error says why: NumPy's own writing forgets the number of the
error."""

from typing import BinaryIO

import numpy as np


def write_header(file: BinaryIO, dtype: np.dtype, rows: int) -> None:
    """The beginning of a .npy file; the bytes of the array [rows] come after it."""
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """A .npy file of an array [rows], byte for byte as `numpy.save` writes it."""
    write_header(file, array.dtype, len(array))
    file.write(np.ascontiguousarray(array).data)
