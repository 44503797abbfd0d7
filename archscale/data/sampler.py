"""The order of the training windows: a pure function of (seed, global sample number).

Nothing is stored and nothing is stepped through: the window that sample number 10^12 gets costs
what number 0 costs, on any world size, after any restart. Every epoch is a fresh permutation of all
windows.
"""

import functools

import numpy as np

_ROUNDS = 8
# Working out a thousand numbers takes little longer than a few: each round is one call of numpy.
_BLOCK = 1024
_BLOCKS = 8


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: uint64 → uint64, every input bit reaching every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(values: np.ndarray, key: np.ndarray, half: int) -> np.ndarray:
    """A Feistel network: for each key a bijection of [0, 4^half), whatever the round function
    is."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for r in range(_ROUNDS):
        round_key = _mix(key + np.uint64((r + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF))
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def sample_index(seed: int, number: np.ndarray | int, num_samples: int) -> np.ndarray:
    """The window that each global sample number trains on.

    Args:
        seed: any integer; its low 64 bits count.
        number: global sample numbers, int64 [...], not negative, in the order of the steps.
        num_samples: windows in the split; numbers e * num_samples … (e + 1) * num_samples - 1 visit
            each once.

    Returns:
        int64 [...], each in [0, num_samples).
    """
    numbers = np.asarray(number, np.int64)
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, not {num_samples}")
    if (numbers < 0).any():
        raise ValueError(f"sample numbers start at 0, not {numbers.min()}")
    epoch, position = np.divmod(numbers.ravel(), np.int64(num_samples))
    half = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        key = _mix(
            _mix(np.full(epoch.shape, seed & 0xFFFFFFFFFFFFFFFF, np.uint64))
            + epoch.astype(np.uint64)
        )
        index = _permute(position.astype(np.uint64), key, half)
        # Cycle walking: follow the permutation of the larger set until it comes back inside. The
        # larger set is at most 4 times the smaller, so few turns are needed.
        while (outside := np.flatnonzero(index >= np.uint64(num_samples))).size:
            index[outside] = _permute(index[outside], key[outside], half)
    return index.astype(np.int64).reshape(numbers.shape)


class WindowOrder:
    """`sample_index` of one data set, worked out in blocks of `_BLOCK` numbers, the last few of
    which are kept: for numbers that follow each other, as a run asks for them, a small part of the
    time.

    Args:
        seed, num_samples: as of `sample_index`.
    """

    def __init__(self, seed: int, num_samples: int):
        self.seed, self.num_samples = seed, num_samples
        self._block = functools.lru_cache(maxsize=_BLOCKS)(self._block_uncached)

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """The window of each sample number: int64 [n] → int64 [n]."""
        blocks, places = np.divmod(numbers, _BLOCK)
        indices = np.empty(numbers.shape, np.int64)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            indices[here] = self._block(block)[places[here]]
        return indices

    def _block_uncached(self, block: int) -> np.ndarray:
        first = block * _BLOCK
        numbers = np.arange(first, first + _BLOCK, dtype=np.int64)
        return sample_index(self.seed, numbers, self.num_samples)


def rank_numbers(first: int, size: int, rank: int, world: int, micro_batch: int) -> np.ndarray:
    """The part of a step's sample numbers that one rank trains on.

    Over all ranks and micro-batches the parts are the step's numbers, each once, whatever `world`
    and `micro_batch`.

    Args:
        first, size: the step takes the global sample numbers first … first + size - 1.

    Returns:
        int64 [size / (world * micro_batch), micro_batch].

    Raises:
        ValueError: the batch does not divide, or `rank` is outside the world.
    """
    if world < 1 or micro_batch < 1 or not 0 <= rank < world:
        raise ValueError(f"rank {rank} of world {world} with micro-batches of {micro_batch}")
    if size < 1 or size % (world * micro_batch):
        raise ValueError(
            f"{size} sequences do not divide over {world} ranks x micro-batches of {micro_batch}"
        )
    return np.arange(first, first + size, dtype=np.int64).reshape(-1, world, micro_batch)[:, rank]
