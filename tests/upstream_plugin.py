"""A pytest plugin that puts ours in the place of flax's, under flax's own tests.

flax's modules look `lax.conv_general_dilated` up when they run. Each of those that take part
gets a `lax` of its own: ours calls the real one where it leaves a convolution to it.
"""

import types

import flax.linen.linear
import flax.nnx
import pytest
from jax import lax

from conv_pallas import conv_general_dilated
from conv_pallas.nn import Conv, ConvTranspose

calls = {"Conv": 0, "ConvTranspose": 0, "conv_general_dilated": 0}


class CountedConv(Conv):
    """Ours; the tests of nnx.Conv would pass as well if nobody had put it there."""

    def __call__(self, *args, **kwargs):
        calls["Conv"] += 1
        return super().__call__(*args, **kwargs)


class CountedConvTranspose(ConvTranspose):
    def __call__(self, *args, **kwargs):
        calls["ConvTranspose"] += 1
        return super().__call__(*args, **kwargs)


def _counted(*args, **kwargs):
    calls["conv_general_dilated"] += 1
    return conv_general_dilated(*args, **kwargs)


class _Lax(types.ModuleType):
    conv_general_dilated = staticmethod(_counted)

    def __getattr__(self, name):
        return getattr(lax, name)


flax.nnx.Conv = CountedConv
flax.nnx.ConvTranspose = CountedConvTranspose
flax.linen.linear.lax = _Lax("lax")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"ours was called: {calls}")
