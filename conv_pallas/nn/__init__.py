"""Layers and models for `flax.nnx`."""

from conv_pallas.nn.block import TemporalBlock
from conv_pallas.nn.conv import Conv
from conv_pallas.nn.conv_transpose import ConvTranspose
from conv_pallas.nn.replace import replace_convs
from conv_pallas.nn.runs import compiled_step
from conv_pallas.nn.tcn import TCN

__all__ = ["TCN", "Conv", "ConvTranspose", "TemporalBlock", "compiled_step", "replace_convs"]
