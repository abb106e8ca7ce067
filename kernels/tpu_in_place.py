"""The dense causal convolution on a TPU, and its mirror image, with taps read where x lies.

    y[n, u] = sum over k of  x[n, u - (K-1-k)*D] @ w[k]

The block of x that the grid brings is read K times where it lies; only the rows that reach into
the block before come from a scratch of two halos. `tpu_dense.py` copies each block into a window
instead, which any padding allows, and which takes a tenth of the time at C = 128, by libtpu's
schedules. The input gradient is the same with time running backwards, and the kernel gradient
meets the same rows.

Operations and bytes are those of `tpu_dense.py`: ``2 N T K C O``, and x and y once each.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from conv_pallas.kernels.tpu_matmul import (
    add_bias_gradient,
    add_products,
    chunk_rows,
    dot,
    finish,
    gradient_chunk_rows,
    gradient_rows,
)
from conv_pallas.kernels.tpu_window import (
    LANES,
    TILE_ROWS,
    Chip,
    Walk,
    by_chunks,
    cleared,
    round_up,
)


def in_place_kernel(walk, H, older, mirrored, around, x_ref, *refs):
    """One tile of time of a causal convolution: taps are read where x lies, but for some rows.

    ``edge`` holds the last rows of the tile before, and the first of this one. Where the ``older``
    taps make columns of their own, ``later`` holds those products, also of the tile before: they
    belong to outputs some steps on. ``mirrored`` is the input gradient: the same with time running
    backwards, tiles and all. ``H`` rows of a neighbour are in reach.
    """
    refs = list(refs)
    saved_ref = refs.pop(0) if around.slope_of else None
    w_ref, b_ref = refs.pop(0), refs.pop(0) if around.bias else None
    out_refs = [refs.pop(0) for _ in range(1 + around.keep)]
    edge = refs.pop(0)
    later = refs.pop(0) if older else None
    D, n, O = walk.dilation, walk.rows, out_refs[0].shape[2]
    taps = walk.taps - older
    x = x_ref.at[0]
    if refs:  # converted once, not once for each tap
        load, (x,) = gradient_rows(around, x_ref, saved_ref), refs

        def copied(at, n):
            x[pl.ds(at, n)] = load(at, n).astype(x.dtype)

        by_chunks(n, copied)
    # Where the rows that meet another tile lie, in x and in ``edge``, and where that tile's.
    mine, here, there = (n - H, 0, H) if mirrored else (0, H, 0)
    kept = 0 if mirrored else n - H

    @pl.when(pl.program_id(2) == 0)
    def _():
        edge[pl.ds(there, H)] = jnp.zeros((H, edge.shape[1]), edge.dtype)
        if older:
            later[pl.ds(n if mirrored else 0, H)] = jnp.zeros((H, O), later.dtype)

    edge[pl.ds(here, H)] = x[pl.ds(mine, H)]

    fars = [(k if mirrored else taps - 1 - k) * D for k in range(taps)]
    windows = [_tap(x, edge, H, n, far, mirrored) for far in fars]
    acc = dot(jnp.concatenate(windows, 1), w_ref[...], "bf16")
    if older:
        later[pl.ds(0 if mirrored else H, n)] = acc[:, O:]
        acc = acc[:, :O] + later[pl.ds(older * D if mirrored else H - older * D, n)]
        later[pl.ds(n if mirrored else 0, H)] = later[pl.ds(0 if mirrored else n, H)]
    finish(around, acc, b_ref, out_refs, 0)
    edge[pl.ds(there, H)] = x[pl.ds(kept, H)]


def _tap(x, edge, H: int, n: int, far: int, mirrored: bool = False):
    """The n rows of x that a tap meets, ``far`` rows before those of the output; or after them."""
    if mirrored:
        parts = [x[pl.ds(far, n - H)], edge[pl.ds(far, H)]]
    else:
        parts = [edge[pl.ds(H - far, H)], x[pl.ds(H - far, n - H)]]
    return jnp.concatenate(parts, 0)


def in_place_kernel_grad(walk, H, around, mxu, x_ref, g_ref, *refs):
    """One tile of time of a causal convolution's kernel gradient; as `in_place_kernel`."""
    *refs, edge = refs
    saved_ref = refs.pop(0) if around.slope_of else None
    dw_ref, db_ref = (*refs, None)[:2]
    n, x, s = walk.rows, x_ref.at[0], pl.program_id(4)

    cleared(refs, (pl.program_id(3) == 0) & (s == 0))
    cleared([edge.at[pl.ds(0, H)]], s == 0)

    edge[pl.ds(H, H)] = x[pl.ds(0, H)]
    g = gradient_rows(around, g_ref, saved_ref)(0, n)
    if around.bias:
        add_bias_gradient(db_ref, g)
    taps = [_tap(x, edge, H, n, (walk.taps - 1 - k) * walk.dilation) for k in range(walk.taps)]
    add_products(dw_ref, g.astype(x.dtype), taps, "bf16", mxu)
    edge[pl.ds(0, H)] = x[pl.ds(n - H, H)]


def gradient_in_place(walk: Walk, x_dtype, C: int, O: int, mxu: int) -> bool:
    """Whether `in_place_kernel_grad` will do, as `placement` says it of the forward one.

    And x is of bfloat16, and no tile reaches past its end: what lies there may be NaN.
    """
    chunk = gradient_chunk_rows(walk.rows, "bf16", walk.taps, C, O, mxu)
    causal = _short(walk, C, chunk) and walk.low == walk.halo
    return x_dtype == jnp.bfloat16 and causal and walk.time % walk.rows == 0


def _short(walk: Walk, C: int, chunk: int) -> bool:
    """Whether the halo is shorter than a tile of whole lanes, which is one chunk.

    And there is an output for each step of x that a tap sees; others may be cropped off its end.
    """
    fits = 0 < round_up(walk.halo, TILE_ROWS) < walk.rows <= chunk
    return C % LANES == 0 and fits and walk.time == walk.out_time


def placement(walk: Walk, C: int, O: int) -> str | None:
    """Whether `in_place_kernel` will do: ``"causal"``, ``"mirrored"``, or None.

    All padding is on one side, and as long as the halo, which is shorter than a tile; and a tile is
    one chunk. The end of x may be cropped.
    """
    if not _short(walk, C, chunk_rows(walk.rows, "bf16", walk.taps, C, O)):
        return None
    if walk.low == walk.halo:
        return "causal"
    # Beyond the last step is padding: no tile may hold what is neither.
    return "mirrored" if walk.low == 0 and walk.time % walk.rows == 0 else None


def older_taps(walk: Walk, C: int, BO: int, O: int, chip: Chip) -> int:
    """How many taps make columns of their own, where a narrow output leaves half of them idle.

    One pass of a 256 wide matrix unit then holds 2 x 2 taps of 128 channels, rather than 2.
    """
    older = walk.taps // 2
    fewer = pl.cdiv((walk.taps - older) * C, chip.mxu) < pl.cdiv(walk.taps * C, chip.mxu)
    return older if O % LANES == 0 and BO == O and 2 * O <= chip.mxu and fewer else 0


def side_by_side(w, older: int, mirrored: bool):
    """``(K, C, O)`` to ``(taps*C, 2*O)``: near taps, and in columns of their own the others.

    Of an odd number the tap in the middle is in both, half of it in each, which is exact. A zero in
    its place would multiply a step that the output sees through no tap, and that may be NaN.
    """
    taps = w.shape[0] - older
    if taps > older:
        w = jnp.asarray(w).at[older].multiply(0.5)
    near, far = (w[:taps], w[older:]) if mirrored else (w[older:], w[:taps])
    return jnp.concatenate([near, far], 2).reshape(-1, 2 * w.shape[2])
