"""Dense convolutions by programs that stay, in Triton; most of all of few channels.

    y[n, u, o]  = sum over k, c of  x[n, u + k*D - low, c] * w[k, c, o]
    dx          = the same of g, with taps reversed and channels in and out exchanged
    dw[k, c, o] = sum over n, u of  x[n, u + k*D - low, c] * g[n, u, o]

Operations: ``2 N T' K C O`` each. Bytes: from and to memory x, w and y once, as in `triton_dense`.
But a program of `triton_matmul.conv_dense` makes one tile of y, and fetches the whole kernel for it
from the L2 cache. With few channels that is much: for C = O = 64, K = 3 in bf16 and 128 steps, 24
KiB beside 3 times 16 of x, where 16 come from memory and 16 go there. Here a program stays on its
processor. It loads the kernel once, keeps it in shared memory and goes from tile to tile; while one
is multiplied and stored, the copy engine fetches the next.

In the kernel gradient a program keeps the sums of all K taps in registers, and so fetches a tile of
g once where `conv_dense_kernel_grad`, with a program for each tap, does it K times.

Measured on an H200 (benchmarks/results/nvidia-h200), C = O = 64, K = 3, 2^19 steps in bf16: a
program for each tile of 128 steps takes 55 us; two on each processor that keep the kernel and take
tiles of 64 steps 43; and two of `conv_onward`, which fetch the kernel anew and have room for tiles
of 128 steps, 40. A copy of as many bytes takes 34.5. With C = O = 512 two programs of `conv_onward`
take 75 us at D = 1, where one for each tile of 128x256 took 79 to 84. But at D = 1024 of 4096 steps
they take 107, and those that leave out tiles of padding 70; what takes so long is not known. So
`triton_dense` lets programs stay where little is padding.

Of sixteen tiles that one is the fastest at C = 512 (tiles-dense-512.jsonl there). By estimate its
programs fetch 0.8 GB from the L2 cache in those 75 us; a tile of 128x256 fetches three quarters of
it, but leaves its processor idle while it is stored. The copy engine could store meanwhile. But a
kernel has to make the descriptor of a result itself, in scratch memory, and jaxlib 0.11.2 can't
allocate that within a CUDA graph (CUDA_ERROR_NOT_SUPPORTED).

In the kernel gradient all this leaves more partial sums to be added, and ptxas lets each product
wait for the one before (its C7515: the sums of several taps are under way from one tile to the
next); it is only among the tiles that `conv_pallas.tuning.tune` tries.

No warps of their own for the copies: Triton's ``tl.range(warp_specialize=True)`` splits such tiles
among two groups of warps, and for sm_90a can't do that to descriptors of three axes (3.9.0), of
which the first keeps the zeros of one sample apart from the next sample's steps.
"""

import triton
import triton.language as tl

from conv_pallas.kernels.triton_activation import activate
from conv_pallas.kernels.triton_common import offsets
from conv_pallas.kernels.triton_config import SHARED_BYTES, Config

REGISTERS = 200  # of a thread's 255 for sums; with 224 they spilled


def fits(config: Config, taps: int, out_itemsize: int) -> bool:
    """Whether the kernel and, for each stage, what is fetched of x fit into shared memory."""
    columns = config.columns + config.stages * config.rows
    out = _on_its_way_out(config, out_itemsize)
    return _have_room(config, 2 * taps * config.depth * columns + out, taps)


def goes_on(config: Config, out_itemsize: int) -> bool:
    """Whether what `conv_onward` fetches fits, beside a tile on its way out."""
    # That of 32 bits is not free while the next is fetched.
    tiles = config.stages * config.depth * (config.rows + config.columns)
    out = _on_its_way_out(config, out_itemsize)
    return out_itemsize == 2 and _have_room(config, 2 * tiles + out, 2)


def sums_fit(config: Config, taps: int, bias: bool) -> bool:
    """Whether the kernel gradient's sums fit into registers, and its tiles into shared memory."""
    sums = taps * config.rows * config.columns + bias * config.depth * config.columns
    tiles = config.stages * config.depth * (taps * config.rows + config.columns)
    in_registers = sums <= REGISTERS * 32 * config.warps
    return in_registers and _have_room(config, 2 * tiles, taps + 1)


def _on_its_way_out(config: Config, itemsize: int) -> int:
    """The most bytes of shared memory that a result takes there, read off the compiled kernels.

    Of 16 bits Triton moves a piece for each warp at a time, and of 32 bits up to a whole tile.
    """
    tile = itemsize * config.rows * config.columns
    return tile if itemsize == 4 else min(tile, 4096 * config.warps)


def _have_room(config: Config, size: int, fetched: int) -> bool:
    """Whether `resident` programs of so many bytes share a processor's memory.

    Each has a barrier of 8 bytes for each tile that is fetched in a stage, and costs 1 KiB.
    """
    return config.resident * (size + 8 * (config.stages * fetched + 4) + 1024) <= SHARED_BYTES


@triton.jit
def _tap(w, k, C: tl.constexpr, O: tl.constexpr, K: tl.constexpr, CONTRACT_LAST: tl.constexpr,
         REVERSE: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    # By pointers, so that all taps are on their way at the same time: the engine's loads outside of
    # a loop are waited for one by one.
    c = tl.arange(0, BC)
    o = tl.arange(0, BO)
    start = w + (K - 1 - k if REVERSE else k) * (C * O)
    if CONTRACT_LAST:
        inside = (o < O)[:, None] & (c < C)[None, :]
        wb = tl.load(start + (o * C)[:, None] + c[None, :], inside, 0.0).T
    else:
        inside = (c < C)[:, None] & (o < O)[None, :]
        wb = tl.load(start + (c * O)[:, None] + o[None, :], inside, 0.0)
    return wb


@triton.jit
def _store(acc, y, z, n, u0, o, U, O: tl.constexpr, ACTIVATION: tl.constexpr, BT: tl.constexpr):
    """What becomes of a tile of sums, from step u0 of sample n on, in the channels ``o``."""
    j = tl.arange(0, BT)
    where = (n.to(tl.int64) * U + u0) * O + offsets(j, O, BT)[:, None] + o[None, :]
    inside = (u0 + j < U)[:, None] & (o < O)[None, :]
    if z is not None:
        tl.store(z + where, acc.to(z.dtype.element_ty), inside)
    acc = activate(acc, ACTIVATION)
    tl.store(y + where, acc.to(y.dtype.element_ty), inside)


@triton.jit
def conv_resident(
    x, w, bias, U, D, LOW, TILES, STEP, y, z,
    C: tl.constexpr, O: tl.constexpr, K: tl.constexpr, CONTRACT_LAST: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Every STEP-th of TILES tiles ``(BT, O)`` of y, of one group and all its channels.

    x is a `Tile`; z is None, or takes what the activation is applied to.
    """
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (_tap(w, k, C, O, K, CONTRACT_LAST, REVERSE, BC, BO),)  # noqa: RUF005
    o = tl.arange(0, BO)
    if HAS_BIAS:
        b = tl.load(bias + o, o < O, 0.0).to(tl.float32)[None, :]
    per_sample = tl.cdiv(U, BT)
    for tile in tl.range(tl.program_id(0), TILES, STEP):
        n = tile // per_sample
        u0 = tile % per_sample * BT
        acc = tl.zeros((BT, BO), tl.float32)
        for k in tl.static_range(K):
            xb = x.load([n, u0 + k * D - LOW, 0]).reshape(BT, BC)
            acc = tl.dot(xb, taps[k], acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += b
        _store(acc, y, z, n, u0, o, U, O, ACTIVATION, BT)


@triton.jit
def conv_onward(
    x, w, bias, U, D, LOW, TILES, STEP, y, z,
    C: tl.constexpr, O: tl.constexpr, K: tl.constexpr, CONTRACT_LAST: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Every STEP-th of TILES tiles ``(BT, BO)`` of y, of one group and any number of channels.

    x and w are `Tile`s; z is None, or takes what the activation is applied to. Over `conv_dense`
    it gains the start of a program, and a tile's first loads, which are under way while the tile
    before is stored. It takes more registers, so that some activations spill beside 128x256 sums,
    and waits for the bias of more than 64 channels.
    """
    TILES_O: tl.constexpr = (O + BO - 1) // BO
    TILES_C: tl.constexpr = (C + BC - 1) // BC
    # Of many channels, kept for the next tile it would take registers, which spill.
    ONCE: tl.constexpr = HAS_BIAS and BO <= 64 and O <= BO
    if ONCE:
        o = tl.arange(0, BO)
        b = tl.load(bias + o, o < O, 0.0).to(tl.float32)[None, :]
    per_sample = tl.cdiv(U, BT)
    for tile in tl.range(tl.program_id(0), TILES, STEP, flatten=True):
        o0 = tile % TILES_O * BO
        row = tile // TILES_O
        n = row // per_sample
        u0 = row % per_sample * BT
        acc = tl.zeros((BT, BO), tl.float32)
        for i in tl.range(K * TILES_C):
            k = i // TILES_C
            c0 = i % TILES_C * BC
            xb = x.load([n, u0 + k * D - LOW, c0]).reshape(BT, BC)
            kw = K - 1 - k if REVERSE else k
            if CONTRACT_LAST:
                wb = w.load([kw, o0, c0]).reshape(BO, BC).T
            else:
                wb = w.load([kw, c0, o0]).reshape(BC, BO)
            acc = tl.dot(xb, wb, acc, input_precision=PRECISION)
        o = o0 + tl.arange(0, BO)
        if ONCE:
            acc += b
        elif HAS_BIAS:
            acc += tl.load(bias + o, o < O, 0.0).to(tl.float32)[None, :]
        _store(acc, y, z, n, u0, o, U, O, ACTIVATION, BT)


@triton.jit
def conv_resident_kernel_grad(
    x, gy, U, D, LOW, TILES, STEP, out,
    C: tl.constexpr, O: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BIAS: tl.constexpr, BU: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dw of one group, and with BIAS db after it, summed over every STEP-th of TILES tiles.

    x and gy are `Tile`s. No tile may reach beyond the last step of gy where x goes on: gy is zero
    there, but zero times NaN is NaN.
    """
    ROWS: tl.constexpr = K * C + (1 if BIAS else 0)
    split = tl.program_id(0)
    per_sample = tl.cdiv(U, BU)
    dw = ()
    for _ in tl.static_range(K):
        dw = dw + (tl.zeros((BC, BO), tl.float32),)  # noqa: RUF005
    db = tl.zeros((BU, BO), tl.float32)
    for tile in tl.range(split, TILES, STEP):
        n = tile // per_sample
        u0 = tile % per_sample * BU
        gb = gy.load([n, u0, 0]).reshape(BU, BO)
        added = ()
        for k in tl.static_range(K):
            xb = x.load([n, u0 + k * D - LOW, 0]).reshape(BU, BC)
            added = added + (tl.dot(xb.T, gb, dw[k], input_precision=PRECISION),)  # noqa: RUF005
        dw = added
        if BIAS:
            db += gb.to(tl.float32)
    c = tl.arange(0, BC)
    o = tl.arange(0, BO)
    start = out + split.to(tl.int64) * ROWS * O
    inside = (c < C)[:, None] & (o < O)[None, :]
    for k in tl.static_range(K):
        where = start + (k * C + c)[:, None] * O + o[None, :]
        tl.store(where, dw[k].to(out.dtype.element_ty), inside)
    if BIAS:
        tl.store(start + K * C * O + o, tl.sum(db, 0).to(out.dtype.element_ty), o < O)
