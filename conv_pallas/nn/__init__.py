"""Layers and models for `flax.nnx`."""

from conv_pallas.nn.conv import Conv, replace_convs

__all__ = ["Conv", "replace_convs"]
