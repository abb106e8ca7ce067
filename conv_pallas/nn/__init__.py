"""Layers and models for `flax.nnx`."""

from conv_pallas.nn.conv import Conv, replace_convs
from conv_pallas.nn.tcn import TCN, TemporalBlock

__all__ = ["TCN", "Conv", "TemporalBlock", "replace_convs"]
