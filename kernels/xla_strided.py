"""Strides by formulations for every step: S steps side by side are one of S times the channels.

A kernel gradient with a stride S sees S steps as one row, which networks for images call space to
depth. Tap ``q * S + p`` is then tap q of channels ``p * C`` to ``(p + 1) * C``:

    row[r, p * C + c]   = x[r * S + p - low, c]
    dw[q * S + p, c, o] = sum over u of  row[u + q, p * C + c] * g[u, o]

An input gradient of such a layer, for which S is a dilation of its input g, gives S steps of its
result in one row, and sees no zero between two steps of g (W. Shi et al., 2016, arXiv:1609.05158,
have it for images):

    dx[low - p + r * S] = sum over q of  g[r + q] @ w[q * S + p]          for 0 <= p < S

Operations: those of the convolution; in a kernel gradient times ``S * ((K - 1) * D // S + 1) / K``,
as it rounds taps up to whole rows, and has all steps between the taps of a dilation. Bytes: a copy
of x with its padding, or of dx with what is cut off, beside what the formulation itself holds.
"""

from jax import lax

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


def depth_to_space(formulation, one_tap, otherwise):
    """A forward formulation, whose result has a row for each step of a dilated input.

    Args:
      one_tap: ``(N, T, C), (C // G, O), G, numbers -> (N, T, O)``. Taps that fill no row have it
        to themselves: filled up with zeros they would multiply them with what may be a NaN.
      otherwise: the formulation where the kernel has a dilation as well.
    """

    def forward(x, w, spec, numbers):
        S, G, low = spec.input_dilation, spec.groups, spec.padding[0]
        if spec.kernel_dilation > 1:
            return otherwise(x, w, spec, numbers)
        numbers = numbers._replace(out=numbers.acc)
        (N, T, _), (K, c, O) = x.shape, w.shape
        length = (spec.out_time - 1) * spec.stride + 1  # the stride is taken at the end
        # Rows, by the step that they begin at.
        first, last = -(low // S), -((low + 1 - length) // S)
        rows, (whole, rest) = last - first + 1, divmod(K, S)
        x = pad_along(x, 1, -first, last + whole + (rest > 0) - T)

        def beside(w, phases):
            """As many taps side by side, the last one first: ``(taps, c, G * phases * o)``."""
            w = w.reshape(-1, phases, c, G, O // G)[:, ::-1]
            return w.transpose(0, 2, 3, 1, 4).reshape(-1, c, phases * O)

        def apart(y, phases):
            return y.reshape(N, rows, G, phases, O // G).swapaxes(2, 3).reshape(N, rows, phases, O)

        y = None
        if whole:
            own = ConvSpec(rows + whole - 1, whole, groups=G)
            y = formulation(x[:, : own.time], beside(w[: whole * S], S), own, numbers)
            y = apart(y, S)
        if rest:
            (tap,) = beside(w[whole * S :], rest)
            more = apart(one_tap(x[:, whole : whole + rows], tap, G, numbers), rest)
            more = pad_along(more, 2, S - rest, 0)
            y = more if y is None else y + more
        y, start = y.reshape(N, rows * S, O), S - 1 - low - first * S
        return lax.slice_in_dim(y, start, start + length, spec.stride, axis=1)

    return forward
