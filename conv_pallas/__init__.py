"""Dilated causal 1-D convolution for JAX, as fast as the machine at hand allows.

    from conv_pallas import conv1d                  # the function
    from conv_pallas.nn import Conv, replace_convs  # the layer, in place of flax.nnx.Conv
"""

from conv_pallas.ops import conv1d, conv_general_dilated, explain

__all__ = ["conv1d", "conv_general_dilated", "explain"]
__version__ = "0.1.0"
