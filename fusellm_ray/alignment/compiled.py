"""How the kernels of this package are compiled: without the GIL, and cached on disk where that is possible."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call. Numba caches beside the module, or else in the user's cache folder."""
    try:
        return njit(nogil=True, cache=False)(function)
    except RuntimeError:  # numba found no folder it may write its cache to: compile in every process instead
        return njit(nogil=True)(function)


def frozen(array: NDArray, dtype: type) -> NDArray:
    """Read-only and contiguous: a kernel is compiled once, for that kind of array."""
    array = np.ascontiguousarray(array, dtype).view()
    array.flags.writeable = False
    return array
