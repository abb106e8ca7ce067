"""`replace_convs`, which puts our layers in the place of flax's."""

from flax import nnx

from conv_pallas.dispatch import Implementation
from conv_pallas.nn.conv import Conv, order
from conv_pallas.nn.conv_transpose import ConvTranspose

OURS = {nnx.Conv: Conv, nnx.ConvTranspose: ConvTranspose}


def replace_convs[M: nnx.Module](model: M, *, implementation: Implementation = None) -> M:
    """Turns every `flax.nnx.Conv` and `ConvTranspose` of `model` into ours, in place.

    Parameters, references to the layers and layers shared between modules stay what they
    are. Subclasses of them are left alone, for they may mean something else by a call; those
    that are ours already get the new `implementation`.

    Args:
      model: any module, or list or dict of modules; it may itself be such a layer.
      implementation: for every layer, as in `conv_pallas.conv1d`.

    Returns:
      `model`, the same object.

    Raises:
      ValueError: `implementation` is unknown.
      TypeError: there is no `nnx.Module`, such as in a `flax.linen.Module`.
    """
    modules = [module for _, module in nnx.iter_modules(model)]
    if not modules:
        raise TypeError(
            f"model must be a flax.nnx.Module or hold some, got {type(model).__module__}."
            f"{type(model).__name__}; flax.linen.Conv takes conv_pallas.conv_general_dilated"
        )
    for module in modules:
        if ours := OURS.get(type(module)):
            module.__class__ = ours
        if type(module) in OURS.values():
            order(module, implementation)
    for module in modules:
        if hasattr(module, "adopt_convs"):
            module.adopt_convs()
    return model
