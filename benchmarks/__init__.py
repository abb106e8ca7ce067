"""Measurements of conv_pallas: run from a checkout, whether or not the package is installed."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

_KERNELS = Path(__file__).parents[1] / "kernels"


class _Checkout:
    """Finds the kernels beside the package where no installation does: see `setup.py`.

    A GPU that one has for half an hour is not the place to install anything.
    """

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        if name != "conv_pallas.kernels":
            return None
        return importlib.util.spec_from_file_location(
            name, _KERNELS / "__init__.py", submodule_search_locations=[str(_KERNELS)]
        )


sys.meta_path.append(_Checkout)
