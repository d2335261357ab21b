"""Host memory for batches that is used again once nobody holds the batch.

Fresh memory for 128 images costs more than filling it: the system hands out empty pages.
"""

import sys

import numpy as np

MAX_ARRAYS = 4
"""Batches that may be alive at once before further ones get memory of their own."""


class Memory:
    """Float32 arrays that come back by themselves.

    A tensor made by `torch.from_numpy`, and every view of it, holds a reference to the array; an
    array without references is free.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._unused = self._references([np.empty(0)], 0)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a contiguous float32 array with any content; nobody else has it."""
        size = int(np.prod(shape))
        for index in range(len(self._arrays)):
            if self._references(self._arrays, index) == self._unused:
                if self._arrays[index].size < size:
                    self._arrays[index] = np.empty(size, np.float32)
                return self._arrays[index][:size].reshape(shape)
        array = np.empty(size, np.float32)
        if len(self._arrays) < MAX_ARRAYS:
            self._arrays.append(array)
        return array[:size].reshape(shape)

    @staticmethod
    def _references(arrays: list[np.ndarray], index: int) -> int:
        """Count references; what this call itself adds is the same for all arrays."""
        return sys.getrefcount(arrays[index])
