"""Kernel gradients with a stride S, by formulations for every step: S steps become one row.

    row[r, s * C + c] = x[r * S + s - low, c]
    dw[k, c, o]       = sum over u of  row[u + k*D // S, k*D % S * C + c] * g[u, o]

so that K taps of C channels, of which an output sees every S-th step, are ``(K - 1) * D // S + 1``
of ``S * C``. What networks for images call space to depth.

Operations: those of the convolution, times ``S * ((K - 1) * D // S + 1) / K``, which rounds taps up
to whole rows, and has all steps between the taps of a dilation. Bytes: a copy of x with its padding
beside what the formulation itself holds.
"""

from conv_pallas.kernels.xla_padding import pad, pad_along
from conv_pallas.spec import ConvSpec


def space_to_depth(formulation):
    """A kernel gradient's formulation, in rows of S steps."""

    def kernel_grad(x, g, spec, numbers):
        S, D, G = spec.stride, spec.kernel_dilation, spec.groups
        (N, _, C), U, O = x.shape, spec.out_time, g.shape[2]
        field = (spec.kernel_size - 1) * D
        taps = field // S + 1
        rows, seen = U + taps - 1, (U - 1) * S + field + 1
        # What no output sees goes first: in a row with what one does see it might be a NaN.
        x = pad_along(pad(x, spec)[:, :seen], 1, 0, rows * S - seen)
        x = x.reshape(N, rows, S, G, C // G).swapaxes(2, 3).reshape(N, rows, S * C)
        dw = formulation(x, g, ConvSpec(rows, taps, groups=G), numbers)
        return dw.reshape(taps * S, C // G, O)[: field + 1 : D]

    return kernel_grad
