"""`python -m tests.train.starved train …`: archscale, where rank 1 cannot read the data of its
third step."""

import os

import numpy as np

from archscale.cli import main
from archscale.data.training_data import TrainingData
from archscale.data.windows import Windows
from archscale.errors import DataError


def _starve() -> None:
    read, calls = TrainingData.windows, [0]

    def windows(data: TrainingData, numbers: np.ndarray) -> Windows:
        calls[0] += 1
        if calls[0] > 2 * 2:  # micro-batches of two steps
            raise DataError("the disk is gone", "a.bin", "mount it")
        return read(data, numbers)

    TrainingData.windows = windows  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        _starve()
    main()
