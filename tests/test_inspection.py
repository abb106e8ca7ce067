"""``python -m conv_pallas inspect`` and ``explain``, as somebody types them."""

import collections
import dataclasses
import os
import re
import signal
import subprocess
import sys

import pytest

from conv_pallas import inspection, kernels, schedule
from conv_pallas.__main__ import main
from conv_pallas._layers import find
from tests.support import environment

SHAPE = "T=200 C=32 K=3 D=4 N=2 activation=relu dtype=bfloat16".split()


def run(*arguments, stdout=subprocess.PIPE):
    return subprocess.run(
        [sys.executable, "-m", "conv_pallas", *map(str, arguments)], stdout=stdout,
        stderr=subprocess.PIPE, text=True, timeout=300,
        env=environment() | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_layer_by_name_and_by_shape():
    assert inspection.parse_layer(["wavenet/D512"]) == find("wavenet/D512")
    layer = inspection.parse_layer(SHAPE)
    assert inspection.parse_layer([" ".join(SHAPE)]) == layer
    sizes = (layer.N, layer.T, layer.C, layer.O, layer.K, layer.D, layer.S, layer.G)
    assert sizes == (2, 200, 32, 32, 3, 4, 1, 1)
    assert (layer.padding, layer.activation, layer.dtype) == ("CAUSAL", "relu", "bfloat16")
    layer = inspection.parse_layer(["T=10 C=4 O=2 K=16 E=8 padding=11"])
    assert (layer.padding, layer.y_shape, str(layer)) == (
        11,
        (1, 80, 2),
        "N=1 T=10 C=4 O=2 K=16 E=8",
    )
    assert layer.products == 80 * 16 * 4 * 2 // 8 and "transposed, stride 8" in layer.kind


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nothing", "layer must be the name of one"),
        ("T=4 C=2", "a shape needs T, C and K, got no K"),
        ("T=4 C=2 K=x", "got 'K=x'"),
        ("T=4 C=2 K=0", "got 'K=0'"),
        ("T=4 C=2 K=3 T=5", "a shape has one T, got 'T=4 C=2 K=3 T=5'"),
        ("T=99999999999 C=2 K=3", "got 'T=99999999999'"),
        ("T=4 C=2 K=3 G=4", "feature_group_count must divide x's 2 channels, got 4"),
        ("T=4 C=2 K=3 padding=wide", "padding must be CAUSAL, SAME, VALID or a number, got 'WIDE'"),
        ("T=4 C=2 K=3 E=2 padding=same", "padding must be given in numbers"),
        ("T=4 C=2 K=3 activation=steep", "activation must be None, a callable or one of"),
        ("T=4 C=2 K=3 dtype=int8", "dtype must be one of float32, bfloat16, float16"),
    ],
)
def test_bad_layers(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inspection.parse_layer(words.split())


def test_bad_options_are_one_line(capsys):
    assert main(["inspect", *SHAPE, "--chip", "p100"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--chip must be one of a100, h100, h200" in line and "got 'p100'" in line


def test_explain(capsys):
    assert main(["explain", *SHAPE, "--platform", "tpu"]) == 0
    told = capsys.readouterr().out
    assert "conv1d on tpu: xla" in told and "pallas_tpu" in told
    assert "conv1d_kernel_grad on tpu" in told


def test_a_reader_who_has_enough():
    read, write = os.pipe()
    os.close(read)
    done = run("explain", *SHAPE, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_bound():
    most = inspection.Limits(1e12, 100e12, "a sheet")
    memory, times = inspection._bound([(1_000_000, 100_000)], most)
    assert "10 operations a byte (the chip turns at 100): memory-bound" in memory
    assert "not below 0.1 µs: 0.01 at 100 TFLOP/s, 0.1 at 1 TB/s (a sheet)" in times
    twice = inspection._bound([(1_000_000, 100_000)] * 2, most)[1]
    assert twice.startswith("in 2 passes not below 0.2 µs")
    assert "compute-bound" in inspection._bound([(1_000_000_000, 100_000)], most)[0]


def test_matrix_unit_share_counts_trips():
    text = """
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v0 }
   0x2   : > { %p5 = scmp.ge.s32.totalorder %s3, 8 }
   0x3   : > { %8 = sbr.rel (!%p5) target = $region9 }
   0x4   :  { %10 = vmatpush1.bf16.msra.mxu1 %v2 }
"""
    found = schedule.read_schedule(text)
    assert (found.matmuls, found.bundles) == (8 + 1, 8 * 3 + 2)


def test_vmem_counts_pipelined_windows_twice():
    mosaic = """
    func.func @k(%a: memref<1x16x8xbf16, #tpu.memory_space<vmem>>,
                 %b: memref<4x8xf32, #tpu.memory_space<vmem>>) attributes {
      window_params = [{transform_indices = @transform_0}]}
    """
    assert inspection._vmem(mosaic) == 2 * 16 * 8 * 2 + 4 * 8 * 4


@pytest.mark.aot
def test_inspect_a_gpu(tmp_path):
    done = run("inspect", *SHAPE, "--chip", "h200", "--dump", tmp_path / "dump")
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert "at 4.8 TB/s (data sheet)" in told
    assert "conv1d: triton" in told and "without an order" in told
    assert re.search(r"BT=\d+ BO=\d+ BC=\d+ warps=\d stages=\d", told)
    assert re.search(r"\d+ registers, \S+ KiB shared, \d+ threads, 0 spills, \d+ blocks", told)
    assert re.search(r"instructions in the listing: .*\d+ tensor cores", told)
    assert told.count("\n  xla: ") == told.count("\n  stock nnx.Conv: ") == 2
    for part in told.split("\n  stock nnx.Conv: ")[1:]:
        assert "cuDNN: size=9" in part.split("\n\n")[0]  # three taps, filled up with zeros
    kinds = collections.Counter(p.suffix for p in (tmp_path / "dump").iterdir())
    assert kinds.keys() == {".hlo", ".stablehlo", ".ttir", ".ttgir", ".ptx", ".sass"}
    assert kinds[".sass"] == 4  # the forward pass, and each operation of the step
    for kind, sign in {"ttir": "tt.func", "ptx": ".entry", "sass": "EXIT"}.items():
        assert sign in (tmp_path / "dump" / f"forward-ours-0-conv_dense.{kind}").read_text()


@pytest.mark.aot
def test_inspect_a_kernel_that_has_no_gradients(capsys, monkeypatch):
    declines = lambda p: None if p.operation == "conv1d" else "computes no gradients"  # noqa: E731
    one = dataclasses.replace(kernels.discover()[0]["xla"], implementation="mine", decline=declines)
    found = kernels.discover()[0] | {"mine": one}
    monkeypatch.setattr(kernels, "discover", lambda: (found, {}))
    assert main(["inspect", *SHAPE, "--chip", "v5e", "--implementation", "mine"]) == 0
    told = capsys.readouterr().out
    assert "conv1d_input_grad: nothing that was asked for; without an order " in told
    assert "mine declines: computes no gradients" in told
    assert "  ours: implementation='mine' can't run conv1d_" in told
    assert told.count("\n  stock nnx.Conv: ") == told.count("\n  xla: ") == 2


@pytest.mark.aot
@pytest.mark.usefixtures("shipped")
def test_inspect_knows_what_is_the_default_on_the_chip(capsys):
    assert main(["inspect", "wavenet/D512", "--chip", "h200"]) == 0
    told = capsys.readouterr().out
    assert "conv1d: triton" in told and "without an order" not in told
    chosen = {"h100": "cuda: triton", "b200": "cuda: xla", "v5e": "tpu: pallas_tpu"}
    for chip, implementation in chosen.items():
        assert main(["explain", "wavenet/D512", "--chip", chip]) == 0
        assert f"\nconv1d on {implementation}\n" in capsys.readouterr().out


@pytest.mark.aot
def test_inspect_a_tpu(tmp_path):
    done = run("inspect", *SHAPE, "--chip", "v5e", "--dump", tmp_path / "dump")
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert "conv1d: pallas_tpu" in told
    assert re.search(r"conv1d_time_in_lanes\S*: \d+ bundles, in \d+% of them the matrix unit", told)
    assert re.search(r"\d+ KiB of VMEM", told) and "no measured speed" in told
    assert len(re.findall(r"together \d+ bundles: of one core", told)) == 6  # ours, xla and stock
    names = [p.name for p in (tmp_path / "dump").iterdir()]
    for part in ("dump-conv1d_time_in_lanes-original", "final_bundles", ".stablehlo", ".hlo"):
        assert any(part in name for name in names), part
