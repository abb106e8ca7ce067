"""The Triton kernels' machine code, and what XLA makes of layers that use them."""

import collections
import dataclasses
import functools
import math
import re
import zlib

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("jax_triton")

from benchmarks import device_layers
from conv_pallas import _tuning_gpu, aot, conv1d, inspection
from conv_pallas.kernels import (
    records,
    triton_compat,
    triton_config,
    triton_dense,
    triton_depthwise,
    triton_tuned,
)  # fmt: skip
from conv_pallas.kernels.triton_config import Config
from conv_pallas.machine_code import opcodes_of
from conv_pallas.spec import Epilogue
from tests.cases import Case
from tests.triton_machine_code import ARCHITECTURES, SHARED_BYTES, amd_codes, codes

pytestmark = [pytest.mark.aot, pytest.mark.usefixtures("shipped")]


def _case(name, C, O=None, **kwargs) -> Case:
    kwargs = dict(batch=(8,), T=4096, D=4, dtype="bfloat16") | kwargs
    return Case(name, C=C, O=O or C, **kwargs)


# Every kind of tile that a launcher's heuristic picks appears for one of these.
EVERYWHERE = (
    (_case("dense", 512), "gelu"),
    (_case("bandwidth", 64), "relu"),  # its kernels compute the derivative as they read gy
    (_case("ragged", 25, 30), None),
    (_case("addresses", 450, T=400, batch=(32,)), "gelu"),  # which nothing but pointers can fetch
    (_case("tf32", 256, dtype="float32"), None),
    (_case("tf32_ragged", 25, 30, dtype="float32"), "relu"),
    (_case("tf32x3", 256, dtype="float32", precision="high"), None),
    (_case("tf32x3_ragged", 65, dtype="float32", precision="high"), "silu"),
    (_case("ieee", 256, dtype="float32", precision="highest"), None),
    (_case("depthwise", 512, G=512, K=4), "silu"),
    (_case("taps", 512, G=512, K=87, D=1, T=835, padding="SAME"), "silu"),
    (_case("taps_float16", 65, G=65, K=31, D=8, padding="SAME", dtype="float16"), "tanh"),
)
HOPPER = (
    (_case("narrow", 64, K=5), "silu"),
    (_case("pointwise", 256, K=1), "gelu_exact"),  # the largest tiles that compute a derivative
    (_case("tiny", 16, batch=(1,), T=100, dtype="float16"), "tanh"),
    (_case("tail", 128, T=4001), None),
    (_case("grouped", 256, G=8), "relu"),
    (_case("tf32_few", 256, G=8, dtype="float32"), "relu"),
    (_case("strided", 64, S=2), None),
    (_case("one_channel", 1, 16), None),
    (_case("mixed", 64, out_dtype="float32"), None),
    (_case("depthwise_float32", 256, G=256, S=2, dtype="float32"), "sigmoid"),
    (_case("depthwise_wide", 256, G=256, K=8), "gelu_exact"),
    (_case("multiplier", 64, 256, G=64, K=31), "relu"),
    (_case("multiplier_few", 128, 256, G=128, K=4, D=2, dtype="float32"), "silu"),
    (_case("taps_float32", 256, G=256, K=63, T=835, dtype="float32"), "gelu_exact"),
    # Where ptxas spills, if it may, for the sake of one more program.
    (_case("taps_tight", 512, G=512, K=51, D=1, T=835, batch=(32,), padding="SAME"), None),
    (_case("taps_few", 100, G=100, K=9, T=128, dtype="float16"), "relu"),
)
BY_NAME = {case.name: (case, activation) for case, activation in EVERYWHERE + HOPPER}


def _layer(case: Case, activation: str | None, x, w, bias):
    kwargs = dict(case.kwargs, activation=activation, implementation="triton")
    y, vjp = jax.vjp(lambda *args: conv1d(*args, **kwargs), x, w, bias)
    return y, *vjp(y)


def _packed(case: Case, activation: str | None, sees: bool, x, w, bias, gy, masks):
    """y and all gradients of a layer that is told which taps each output sees, or of a plain one.

    A plain one of many taps has no activation, as nothing is saved for its derivative.
    """
    kernel = triton_depthwise.KERNEL if 1 < case.G == case.C else triton_dense.KERNEL
    epilogue = Epilogue(True, activation)
    problem = dataclasses.replace(case.problem("conv1d", "cuda"), epilogue=epilogue)
    wanted = (True, True, True)
    if sees:
        assert kernel.decline_packed(problem) is None
        y = kernel.packed(problem, x, w, bias, masks)
        return y, kernel.packed_backward(problem, x, w, bias, masks, gy, wanted)
    y = kernel.fused(problem, x, w, bias)
    return y, kernel.backward(problem, x, w, bias, None, gy, wanted)


def _packed_structs(case: Case):
    outputs = aot.struct(case.out_shape, case.dtype)
    return *_structs(case), outputs, aot.struct(case.out_shape[:2], "int32")


def _structs(case: Case):
    shapes = (case.x_shape, case.kernel_shape, (case.O,))
    return tuple(aot.struct(shape, case.dtype) for shape in shapes)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "chip, name",
    [(chip, case.name) for chip in ("a100", "h200", "b200") for case, _ in EVERYWHERE]
    + [("h200", case.name) for case, _ in HOPPER],
)
def test_machine_code_is_as_promised(chip, name):
    case, activation = BY_NAME[name]
    made = codes(chip, functools.partial(_layer, case, activation), *_structs(case))
    # Of what stays on a processor the sums are those of what does not.
    kernels = {code.name.replace("conv_onward", "conv_dense") for code in made}
    for code in made:
        assert code.spills == 0, code
        assert code.shared <= SHARED_BYTES[chip], code
        dense = code.name.startswith(("conv_dense", "conv_onward"))
        assert dense == (case.G < case.C or case.C == 1), code
        if dense:
            assert (code.tensor_cores > 0) == (case.precision != "highest"), code
        if chip == "h200" and code.name == "conv_dense_kernel_grad":
            fields = (code.meta[name] for name in ("BC", "BO", "BU", "warps", "stages"))
            size = 2 if "16" in case.dtype and case.out_dtype is None else 4  # of the wider factor
            precision = case.precision or "tf32"
            room = triton_config.room(Config(*fields), size, precision, activation == "relu")
            assert code.blocks >= room, code
    if case.G < case.C or case.C == 1:
        assert kernels == {"conv_dense", "conv_dense_kernel_grad"}
    elif case.K <= 8 and case.S == 1 and case.O == case.C:
        assert kernels == {"conv_walk", "conv_walk_backward"}
    elif case.S == 1 and case.O == case.C:
        assert kernels == {"conv_taps", "conv_taps_kernel_grad"}
    else:
        assert kernels == {"conv_depthwise", "conv_depthwise_kernel_grad"}
    if chip == "a100" and name in ("dense", "tf32"):
        _check_that_tiles_are_copied_ahead(made[-1], 2 if name == "dense" else 4)
    if chip != "h200":
        return
    if name in ("dense", "tf32", "tf32x3", "tail", "narrow", "grouped"):
        in_kernels = name == "grouped"  # relu's derivative needs gy in registers
        for code in made:
            assert code.opcodes["UTMALDG"] > 0, code
            loads = {op for op in code.listing if op.startswith("LDG.")}
            bias = {"LDG.E.U16", "LDG.E"} if case.dtype == "bfloat16" else loads
            assert in_kernels or (code.opcodes["LDGSTS"] == 0 and loads <= bias), code
    if name in ("dense", "bandwidth", "tf32", "tf32x3", "tail", "narrow"):
        # Where ptxas lets each product wait for the one before, it says so in an aside alone.
        wait = "WARPGROUP.DEPBAR.LE"
        for code in made:
            # Of float32 wgmma can't sum what it does not find with the sum's axis last.
            warps = code.name == "conv_dense_kernel_grad" and case.dtype == "float32"
            by_warps = warps and case.precision is None
            assert (code.opcodes["HGMMA"] > 0) != by_warps, code
            assert code.listing.count(wait) < code.opcodes["HGMMA"] or by_warps, code
    if name == "depthwise":
        _check_wide_loads(made)
    if name in ("taps", "taps_float32"):
        wide = name == "taps_float32"
        _check_that_many_taps_are_multiplied(made, wide, 15 if wide else 12.5)


PACKED = (
    (_case("packed", 512, G=512, K=4), "silu"),
    (_case("packed_series", 2048, G=2048, K=4, D=1024, T=2**14, batch=(1,)), "silu"),
    (_case("packed_eight", 512, G=512, K=8, D=1), "tanh"),
    (_case("packed_float32", 512, G=512, K=4, dtype="float32"), "gelu_exact"),
    (_case("packed_eight_float32", 512, G=512, K=8, dtype="float32"), "gelu_exact"),
    (_case("packed_taps_few", 65, G=65, K=9, dtype="float16"), "tanh"),
    (_case("packed_taps", 512, G=512, K=17), None),
    (_case("packed_taps_all", 512, G=512, K=31, D=1), "silu"),
    (_case("packed_taps_float32", 512, G=512, K=31, dtype="float32"), "gelu_exact"),
    (_case("packed_dense", 512), None),
    (_case("packed_dense_ragged", 25, 30), None),
    (_case("packed_dense_addresses", 450, T=400, batch=(32,)), "relu"),
    (_case("packed_dense_float32", 256, K=31, dtype="float32"), "gelu_exact"),
    (_case("packed_dense_tf32x3", 65, dtype="float32", precision="high"), "silu"),
    (_case("packed_dense_groups", 256, G=8), "relu"),
)


@pytest.mark.sampled
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
@pytest.mark.parametrize("case, activation", PACKED, ids=lambda value: getattr(value, "name", None))
def test_masks_of_packed_sequences_stay_in_registers(chip, case, activation):
    structs = _packed_structs(case)
    made = codes(chip, functools.partial(_packed, case, activation, True), *structs)
    many = ["conv_taps"] * (2 if activation is None else 3) + ["conv_taps_kernel_grad"]
    walked = ["conv_walk", "conv_walk_backward"]
    dense = ["conv_dense"] * (2 if activation is None else 3) + ["conv_dense_kernel_grad"]
    kinds = {"taps": many, "dense": dense}
    kind = next((names for name, names in kinds.items() if name in case.name), walked)
    assert [code.name for code in made] == kind
    for code in made:
        assert code.spills == 0, code
        assert code.shared <= SHARED_BYTES[chip], code
    if case.name == "packed_dense":
        _check_that_tiles_are_copied_ahead(made[-1], 2)
    if case.name in ("packed", "packed_taps"):
        # Of which a plain layer is told nothing.
        plain = codes(chip, functools.partial(_packed, case, activation, False), *structs)
        parameters = lambda code: code.texts["ptx"].count(".param .")  # noqa: E731
        for code, other in zip(made, plain, strict=True):
            assert parameters(code) == parameters(other) + 1


def _check_that_tiles_are_copied_ahead(code, size: int):
    """Both tiles of each product, of numbers of so many bytes, and none through registers."""
    ahead = code.meta["stages"] - (code.chip == "a100")
    assert code.shared >= ahead * code.meta["BU"] * (code.meta["BC"] + code.meta["BO"]) * size, code
    assert code.opcodes["LDGSTS"] > 0, code


def test_masks_compile_for_amd():
    case, activation = PACKED[0]
    f = functools.partial(_packed, case, activation, True)
    for kernel, assembly, _ in amd_codes(f, *_packed_structs(case)):
        assert re.search(r"\.vgpr_spill_count: +0\n", assembly), kernel


@pytest.mark.sampled
@pytest.mark.parametrize(
    "C, O, dtype, activation",
    [
        (512, 512, "bfloat16", "gelu_exact"),
        (512, 512, "float32", "gelu_exact"),
        (512, 512, "float32", "silu"),
        (512, 450, "float32", "gelu"),
        (450, 450, "float32", None),
        (450, 450, "float32", "gelu_exact"),
        (450, 450, "bfloat16", "gelu_exact"),
        (150, 600, "bfloat16", "gelu"),
        (25, 30, "float32", "gelu_exact"),
    ],
)
def test_addresses_and_an_activation_leave_the_sums_in_registers(C, O, dtype, activation):
    """In a forward pass alone; one whose derivative is wanted gives what that is made from."""
    case = _case("layer", C, O, dtype=dtype)
    layer = functools.partial(conv1d, activation=activation, implementation="triton")
    (code,) = codes("h200", layer, *_structs(case))
    assert code.spills == 0, code
    largest = {("float32", "silu"): 256}  # where nothing stands against it
    assert code.meta["BO"] == (largest.get((dtype, activation), 128) if O > 30 else 32)


@pytest.mark.sampled
@pytest.mark.parametrize("C, activation", [(32, None), (30, "silu")])
def test_small_tiles_spill_nothing_for_one_more_program(C, activation):
    """As ptxas would where copies are no engine's; of 30 channels beside a derivative as well."""
    case = _case("few", C, batch=(32,), T=400)
    made = codes("a100", functools.partial(_layer, case, activation), *_structs(case))
    assert [code.name for code in made] == ["conv_dense"] * 2 + ["conv_dense_kernel_grad"]
    kwargs = dict(case.kwargs, activation=activation, implementation="triton")

    def input_grad(x, w, bias):
        y, vjp = jax.vjp(lambda x: conv1d(x, w, bias, **kwargs), x)
        return vjp(y)

    (*_, alone) = codes("a100", input_grad, *_structs(case))
    assert (alone.meta["warps"], alone.meta["BO"]) == (8 if activation else 4, 32)
    for code in (*made, alone):
        assert code.spills == 0, code


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_processor_has_two_programs_where_they_compute_a_derivative(dtype):
    """One of four warps would have nobody who multiplies while it waits, or stores."""
    case = _case("layer", 64, dtype=dtype)
    assert triton_dense.derivative_in_kernels(_relu(case), (True, True, True))
    made = codes("h200", functools.partial(_layer, case, "relu"), *_structs(case))
    assert [code.name for code in made] == ["conv_dense"] * 2 + ["conv_dense_kernel_grad"]
    assert all(code.blocks >= 2 and code.spills == 0 for code in made), made


def _relu(case: Case):
    return dataclasses.replace(case.problem("conv1d", "cuda"), epilogue=Epilogue(True, "relu"))


def test_programs_go_on_to_the_next_tile_of_many_channels():
    case, tile = _case("layer", 512), (128, 256, 64, 8, 4, 1)
    with triton_tuned.trial(tile):
        made = codes("h200", functools.partial(_layer, case, None), *_structs(case))
    assert [c.name for c in made] == ["conv_onward"] * 2 + ["conv_dense_kernel_grad"]
    for code in made[:2]:
        assert code.spills == 0 and code.shared <= SHARED_BYTES["h200"], code
        # One loop over all tiles: the loads in it are ahead of a tile's end, not only of its start.
        assert code.opcodes["UTMALDG"] == 2 * tile[4], code
        assert code.opcodes["HGMMA"] == 4 > code.listing.count("WARPGROUP.DEPBAR.LE"), code


@pytest.mark.sampled
@pytest.mark.parametrize("C", [64, 512])
def test_programs_stay_where_each_has_several_tiles(C):
    case = _case("layer", C, T=2**14)
    made = codes("h200", functools.partial(_layer, case, None), *_structs(case))
    assert [c.name for c in made] == ["conv_onward"] * 2 + ["conv_dense_kernel_grad"]
    # As many as are started have room at a time, or some would begin when the others are done.
    assert all(code.blocks == triton_dense.FEW.resident and not code.spills for code in made[:2])
    # A result of 32 bits is in the way of the next tile.
    wide = dataclasses.replace(case, out_dtype="float32")
    layer = functools.partial(conv1d, **wide.kwargs, implementation="triton")
    (code,) = codes("h200", layer, *_structs(wide)[:2])
    assert code.name == "conv_dense" and not code.spills, code
    # Nor does who stays leave out tiles of padding.
    padded = dataclasses.replace(case, D=2**11)
    layer = functools.partial(conv1d, **padded.kwargs, implementation="triton")
    (code,) = codes("h200", layer, *_structs(padded)[:2])
    assert code.name == "conv_dense" and not code.spills, code
    few = dataclasses.replace(case, T=2**8)
    layer = functools.partial(conv1d, **few.kwargs, implementation="triton")
    (code,) = codes("h200", layer, *_structs(few)[:2])
    assert code.name == "conv_dense", code


@pytest.mark.sampled
@pytest.mark.parametrize(
    "C, K, tile, kernel, sums_stay",
    [
        (64, 3, (64, 64, 64, 4, 3, 2), "conv_resident", True),
        (64, 5, (64, 64, 64, 4, 2, 1), "conv_resident", True),
        (64, 3, (128, 64, 64, 4, 3, 1), "conv_resident", False),  # too many sums for registers
        (128, 2, (64, 128, 128, 4, 2, 1), "conv_resident", False),  # not all channels in a tile
        (128, 2, (128, 128, 64, 8, 3, 1), "conv_onward", True),
        (64, 7, (64, 64, 64, 4, 3, 2), "conv_onward", False),  # nor do so many taps fit
        # So many programs of that size have no room beside each other,
        (64, 3, (64, 64, 64, 4, 2, 3), "conv_onward", True),
        (128, 2, (128, 128, 64, 8, 3, 2), "conv_dense", False),
        # nor this one beside the result on its way out.
        (32, 5, (128, 256, 32, 8, 3, 1), "conv_onward", False),
    ],
)
def test_programs_that_stay_fetch_once(C, K, tile, kernel, sums_stay):
    case, stages, resident = _case("layer", C, K=K), tile[4], tile[5]
    with triton_tuned.trial(tile):
        made = codes("h200", functools.partial(_layer, case, "silu"), *_structs(case))
    *forward, sums = made
    for code in made:
        assert code.spills == 0 < code.opcodes["HGMMA"], code
        assert code.shared <= SHARED_BYTES["h200"], code
    assert {c.name for c in forward} == {kernel}
    assert sums.name == ("conv_resident_kernel_grad" if sums_stay else "conv_dense_kernel_grad")
    for code in made:
        assert "dense" in code.name or code.blocks >= resident, code
    # In the loop and ahead of it K tiles of x for each stage, and none of the kernel.
    loads = {code.opcodes["UTMALDG"] for code in forward}
    assert loads == {K * stages} or kernel != "conv_resident"
    assert sums.opcodes["UTMALDG"] == (K + 1) * stages or not sums_stay


@pytest.mark.sampled
@pytest.mark.parametrize(
    "C, K, dtype, tile",
    [
        (15, 51, "float32", (16, 16, 32, 1, 3, 0, 8)),
        (30, 4, "float32", (32, 32, 32, 1, 3, 0, 4)),
        (25, 7, "bfloat16", (32, 32, 32, 1, 3, 0, 4)),
    ],
)
def test_several_taps_in_a_program_take_fewer_instructions(C, K, dtype, tile):
    """Which by estimate is what a kernel gradient of few channels takes its time for."""
    assert tile in _tuning_gpu.FEW_TILES
    case = _case("layer", C, K=K, dtype=dtype, T=2**14)
    gradient = functools.partial(_kernel_gradient, case)
    instructions = []
    for each in (None, tile):
        with triton_tuned.trial(each):
            (code,) = codes("h200", gradient, *_structs(case)[:2])
        assert code.spills == 0, code
        loop, meta = _longest_loop(code.texts["sass"]), code.meta
        products = meta["TAPS"] * meta["BC"] * meta["BO"] * meta["BU"]
        instructions.append(meta["warps"] * len(loop) / products)
    assert code.meta["TAPS"] == tile[6]
    assert instructions[1] <= 0.51 * instructions[0]


def _kernel_gradient(case: Case, x, w):
    f = functools.partial(conv1d, x, **case.kwargs, implementation="triton")
    return jax.vjp(f, w)[1](x)


@pytest.mark.parametrize("name", ["dense", "tf32_ragged", "depthwise", "multiplier", "taps_few"])
def test_the_same_source_compiles_for_amd(name):
    case, activation = BY_NAME[name]
    made = amd_codes(functools.partial(_layer, case, activation), *_structs(case))
    assert len(made) >= 2
    for kernel, assembly, binary in made:
        assert binary.startswith(b"\x7fELF"), kernel
        assert ("v_mfma" in assembly) == ("dense" in kernel), kernel
        assert re.search(r"\.vgpr_spill_count: +0\n", assembly), kernel


@pytest.mark.sampled
@pytest.mark.parametrize("D", [1, 1024])
@pytest.mark.parametrize("activation", ["silu", None])
def test_depthwise_loads_enough_ahead(D, activation):
    """As by `kernels.triton_depthwise_walk` an H200's bandwidth needs, and in time for it."""
    case = _case("goal", 12288, G=12288, K=4, D=D, batch=(1,), T=2**14)
    layer = functools.partial(conv1d, **case.kwargs, activation=activation, implementation="triton")
    with triton_tuned.trial(None):  # the heuristic's tile
        (code,) = codes("h200", layer, *_structs(case)[:2])
    loop = _longest_loop(code.texts["sass"])
    loads = collections.Counter(loop)["LDG.E.64"]
    assert code.spills == 0 and loads == 8, code
    assert code.blocks * code.threads * loads * 8 >= 32 * 1024, code
    assert len(loop) <= 17 * 4 * loads, code  # of 4 elements each


@functools.cache
def _arithmetic(activation: str | None) -> list[int]:
    """How many floating-point operations are written down of a layer, forward and backward."""
    case = BY_NAME["depthwise"][0]
    made = codes("h200", functools.partial(_layer, case, activation), *_structs(case))
    assert [code.name for code in made[-2:]] == ["conv_walk", "conv_walk_backward"]
    operation = r"= (?:arith\.(?:add|sub|mul|neg|cmp)f|math\.\w+) .*f32"
    return [len(re.findall(operation, code.texts["ttir"])) for code in made[-2:]]


@pytest.mark.sampled
@pytest.mark.parametrize(
    "activation, forward, backward",
    [
        ("silu", 6, 12),
        ("sigmoid", 5, 10),
        ("tanh", 22, 27),
        ("gelu", 30, 41),
        ("gelu_exact", 5, 13),
    ],
)
def test_an_exponent_costs_one_multiplication(activation, forward, backward):
    """Neither a sign nor a second factor: not every compiler makes one constant of them."""
    plain = _arithmetic(None)
    added = [a - b for a, b in zip(_arithmetic(activation), plain, strict=True)]
    assert added == [forward, backward]


def _check_wide_loads(made) -> None:
    """4 channels of 16 bits by one instruction; and several before any result is stored."""
    (forward, *_, backward) = sorted(made, key=lambda code: code.name)
    assert "backward" in backward.name
    for code, size, ahead in ((forward, 64, 8), (backward, 64, 4)):
        order = [op for op in code.listing if op.startswith(("LDG.E.", "STG.E."))]
        tiles = [op for op in order if not op.endswith(("U16", "STG.E"))]
        assert all(op.endswith(f".{size}") for op in tiles), order
        found = rf"(LDG\.E\.{size} ){{{ahead}}}(STG\.E\.{size} ){{1,4}}"
        assert re.search(found, " ".join(tiles) + " ")


def _check_that_many_taps_are_multiplied(made, wide: bool, most: float) -> None:
    """What is loaded of many taps is multiplied many times."""
    assert len(made) == 3
    for code in made:
        R, loop = code.meta["R"], _longest_loop(code.texts["sass"])
        counts = collections.Counter(op.split(".")[0] for op in loop)
        # Two channels of R steps, and as much of the factor that they all have.
        assert counts["FFMA"] == 2 * R * R and counts["LDG"] == 2 * R, (code, counts)
        assert all(op.endswith(".64") == wide for op in loop if "LDG" in op)
        # Nothing waits for another warp: to convert, masks, addresses, and the bias's sum are all.
        assert code.opcodes["BAR"] <= 2, code
        assert len(loop) <= counts["FFMA"] + most * R, (code, counts)


def _longest_loop(sass: str) -> tuple[str, ...]:
    """Opcodes of the longest loop in which there is no other."""
    pieces = re.split(r"^(\.L_x_\d+):", sass, flags=re.M)
    loops = []
    for label, body in zip(pieces[1::2], pieces[2::2], strict=True):
        body, back, _ = body.partition(f"`({label})")
        loops.append(opcodes_of(body) if back else ())
    return max(loops, key=len)


def test_the_machine_code_of_what_was_lowered_before():
    case, activation = BY_NAME["tiny"]
    layer = functools.partial(_layer, case, activation)
    aot.lower_for("h200", layer, *_structs(case))
    made = codes("h200", layer, *_structs(case))
    assert {code.name for code in made} == {"conv_dense", "conv_dense_kernel_grad"}


def test_no_ir_is_sent_along(monkeypatch):
    """jaxlib finds a kernel by all that comes with its call, at each run."""
    sent, compress = [], zlib.compress
    monkeypatch.setattr(zlib, "compress", lambda data: sent.append(data) or compress(data))
    case, activation = BY_NAME["tiny"]
    aot.lower_for("h200", functools.partial(_layer, case, activation), *_structs(case))
    assert len(sent) == 3
    for kernel in sent:
        assert b".entry" in kernel and b"tt.func" not in kernel


def _instructions(hlo: str):
    """Opcode and number of elements of every instruction of an HLO module."""
    for shape, opcode in re.findall(r"= \w+\[([\d,]*)\][^ ]* ([\w-]+)\(", hlo):
        yield opcode, math.prod(int(size) for size in shape.split(",") if size)


# Backward of a depthwise layer is one kernel, and its forward pass stores no z for it.
@pytest.mark.sampled
@pytest.mark.parametrize(
    "name, kernels", [("dense", 3), ("tf32", 3), ("grouped", 3), ("strided", 3), ("depthwise", 2)]
)
def test_a_training_step_moves_no_activation(name, kernels):
    from flax import nnx

    case, activation = BY_NAME[name]
    kwargs = dict(case.kwargs, activation=activation, implementation="triton")

    class Layer(nnx.Module):
        def __init__(self):
            init = nnx.initializers.normal()
            self.first = nnx.Param(jnp.zeros((case.C,)))  # so that x has a gradient
            self.kernel = nnx.Param(init(jax.random.key(0), case.kernel_shape))
            self.bias = nnx.Param(jnp.zeros((case.O,)))

        def __call__(self, x):
            cast = lambda p: p[...].astype(case.dtype)  # noqa: E731
            return conv1d(x * cast(self.first), cast(self.kernel), cast(self.bias), **kwargs)

    graph, params = nnx.split(Layer())

    def step(params, x):
        loss = lambda p: jnp.sum(nnx.merge(graph, p)(x).astype(jnp.float32) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params = jax.tree.map(lambda a: aot.struct(a.shape, a.dtype), params)
    hlo = aot.compile_for("h200", step, params, _structs(case)[0]).as_text()
    assert hlo.count('custom_call_target="triton_kernel_call_ffi"') == kernels
    moved = {"pad", "transpose", "copy", "concatenate", "gather", "convolution"}
    size = math.prod(case.out_shape)
    assert [i for i in _instructions(hlo) if i[0] in moved and i[1] >= size] == []


@pytest.mark.sampled
@pytest.mark.parametrize(
    "C, G, T, before",
    [
        (256, 8, 4096, []), (25, 1, 4096, []), (64, 1, 4096, ["transposed"]),
        (150, 1, 256, ["rounded"]), (150, 1, 4096, ["transposed", "rounded"]),
    ],
)  # fmt: skip
def test_a_kernel_in_float32_is_transposed_for_large_tiles_alone(C, G, T, before):
    """Where the program that does it, and what rounds a large one, takes little of the time."""
    case = _case("layer", C, G=G, T=T, batch=(1,), dtype="float32")
    forward = lambda *args: conv1d(*args, **case.kwargs, implementation="triton")  # noqa: E731
    hlo = aot.compile_for("h200", forward, *_structs(case)).as_text()
    assert (" transpose(" in hlo) == ("transposed" in before)
    assert (" and(" in hlo) == ("rounded" in before)
    entry = hlo[hlo.index("ENTRY") :]
    assert (entry.count(" custom-call("), entry.count(" fusion(")) == (1, bool(before))


@pytest.mark.parametrize(
    "chip, capability", [("a100", 80), ("h100", 90), ("h200", 90), ("b200", 100)]
)
def test_a_kernel_knows_the_chip_it_is_compiled_for(chip, capability, monkeypatch):
    seen, call = [], triton_compat.call

    def spy(*args, **kwargs):
        seen.append(triton_compat.compute_capability())
        return call(*args, **kwargs)

    monkeypatch.setattr(triton_compat, "call", spy)
    case = BY_NAME["tiny"][0]
    f = lambda x, w: conv1d(x, w, **case.kwargs, implementation="triton")  # noqa: E731
    aot.lower_for(chip, f, *_structs(case)[:2])
    assert seen == [capability]


@pytest.mark.sampled
@pytest.mark.parametrize("capability", [86, 120])
def test_the_largest_tiles_fit_where_shared_memory_is_scarce(capability, monkeypatch):
    """99 KiB of a program, of which those of float32 take nearly all."""
    chip = "a100" if capability < 90 else "b200"
    monkeypatch.setitem(ARCHITECTURES, chip, "sm_86" if capability == 86 else "sm_120a")
    monkeypatch.setattr(triton_compat, "compute_capability", lambda: capability)
    case = _case("layer", 128, dtype="float32")
    for code in codes(chip, functools.partial(_layer, case, "relu"), *_structs(case)):
        assert code.spills == 0 and code.shared <= 99 * 1024, code


@pytest.mark.sampled
@pytest.mark.parametrize("capability", [89, 103, 110, 120, 121])
def test_no_chip_gets_a_ptx_that_is_older_than_it(capability, monkeypatch):
    """LLVM would end the process."""
    monkeypatch.setattr(triton_compat, "compute_capability", lambda: capability)
    case = _case("walked", 128, G=128)
    lowered = aot.lower_for("b200", functools.partial(_layer, case, "relu"), *_structs(case))
    assert "triton_kernel_call" in lowered.as_text()


def test_a_precision_that_names_an_algorithm_is_declined():
    """A chain goes on to the next, and an order says why it can't be followed."""
    x, w = aot.struct((2, 64, 32), "float32"), aot.struct((3, 32, 32), "float32")
    with jax.default_matmul_precision("BF16_BF16_F32"):
        chain = functools.partial(conv1d, implementation=("triton", "xla"))
        assert "triton" not in aot.lower_for("h200", chain, x, w).as_text()
        with pytest.raises(NotImplementedError, match="not BF16_BF16_F32"):
            aot.lower_for("h200", functools.partial(conv1d, implementation="triton"), x, w)


# Of the sweep and the goals, those that have a tile in the table of an H200.
TUNED = (
    "tcn-adding/D128", "ms-tcn/D512", "tcn-ptb-words/D8", "conv-tasnet/D128", "depthwise/D1024",
)  # fmt: skip


def test_every_tile_that_is_shipped_compiles_and_spills_nothing(monkeypatch):
    lookup, found = triton_tuned.lookup, {}

    def told(key):
        found[key] = lookup(key)
        return found[key]

    monkeypatch.setattr(triton_tuned, "lookup", told)
    every = [*device_layers.goals(False), *device_layers.sweep(False)]
    for layer in (layer for layer in every if layer.name in TUNED):
        if layer.G == 1:  # whose activation's derivative would have a tile of its own
            layer = dataclasses.replace(layer, activation=None)
        f = device_layers.forward("ours", layer, False)
        # What is walked computes both gradients at once, and one alone otherwise.
        for operation in ("step", "kernel_grad")[: 1 if layer.G == 1 else 2]:
            program = device_layers.operation(operation, f)
            for code in codes("h200", program, *inspection.structs(layer)):
                assert code.spills == 0 and code.shared <= SHARED_BYTES["h200"], code
    shipped = triton_tuned.RECORDS.read(records.FOLDER / "triton_tuned_nvidia-h200.json")["tiles"]
    tiles = {key: tuple(tile) for key, tile in shipped.items() if tile}
    assert tiles and tiles.items() <= found.items()
