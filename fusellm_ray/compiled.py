"""How the kernels of this package are compiled: without the GIL, and cached on disk where that is possible.

Kernels allocate nothing: every array comes from the caller. So numba may leave out its reference counts,
atomic operations that would cost several times what the arithmetic does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call. Numba caches beside the module, or else in the user's cache folder."""
    return _compiled(function, forceinline=False)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for what is called once a candidate."""
    return _compiled(function, forceinline=True)


def _compiled(function: Callable[..., Any], forceinline: bool) -> Callable[..., Any]:
    options = {"nogil": True, "error_model": "numpy", "forceinline": forceinline, "_nrt": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder it may write its cache to: compile in every process instead
        return njit(**options)(function)


def frozen(array: NDArray, dtype: type) -> NDArray:
    """Read-only and contiguous: a kernel is compiled once, for that kind of array."""
    array = np.ascontiguousarray(array, dtype).view()
    array.flags.writeable = False
    return array
