"""Lets vLLM's CPU build take Triton for usable: in the interpreter it runs without the driver that vLLM looks for.

On PYTHONPATH, Python imports this before anything else, in each of vLLM's processes.
"""

import importlib.abc
import importlib.util
import sys
from types import SimpleNamespace


class _WithDriver(importlib.abc.MetaPathFinder):
    """Adds a driver that is always active to `triton.backends`."""

    _is_looking = False

    def find_spec(self, fullname, path, target=None):
        if fullname != "triton.backends" or self._is_looking:
            return None
        self._is_looking = True
        spec = importlib.util.find_spec(fullname)
        self._is_looking = False
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            driver = SimpleNamespace(is_active=lambda: True)
            module.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _WithDriver())
