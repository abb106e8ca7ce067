"""Dilated causal 1-D convolution for JAX, as fast as the machine at hand allows.

`conv1d` is the function; `conv_pallas.nn.Conv` the layer, in place of `flax.nnx.Conv`, and
`conv_pallas.nn.replace_convs` puts it into a model that is there already.
"""

from pathlib import Path as _Path

if not _Path(__file__).with_name("kernels").is_dir():
    # A checkout, imported as it lies: there kernels/ stands beside the package.
    __path__.append(str(_Path(__file__).parents[1]))

from conv_pallas.explanation import explain
from conv_pallas.ops import conv1d, conv_general_dilated
from conv_pallas.primitives import convs_saveable

__all__ = ["conv1d", "conv_general_dilated", "convs_saveable", "explain"]
__version__ = "0.1.0"
