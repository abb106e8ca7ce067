"""The reader of a TPU program's traffic, on programs small enough to count by hand."""

import pytest

from benchmarks.traffic import hbm_bytes, size


def _module(*lines: str) -> str:
    return "HloModule m\n\nENTRY %main (p: f32[8,128]) -> f32[8,128] {\n" + "\n".join(lines) + "\n}"


@pytest.mark.parametrize(("shape", "bytes_"), [
    ("f32[16,256]{1,0:T(8,128)}", 16 * 256 * 4),
    ("f32[3,5]{1,0:T(8,128)}", 8 * 128 * 4),  # in whole tiles
    ("f32[3,130]{0,1:T(8,128)}", 136 * 128 * 4),  # the minor axis is the first one
    ("bf16[10,128]{1,0:T(8,128)(2,1)}", 16 * 128 * 2),
    ("(f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)})", 8 * 128 * 4),  # one in VMEM
    ("pred[8,128]{1,0:T(8,128)}", 8 * 128),
])  # fmt: skip
def test_sizes(shape, bytes_):
    assert size(shape) == bytes_


HBM, VMEM = "f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"
ONE = 8 * 128 * 4


def test_operands_and_results_count_once():
    moved = hbm_bytes(_module(
        f"  %p = {HBM} parameter(0)",
        f"  %near = {VMEM} fusion(%p), kind=kLoop, calls=%c",  # read
        f"  %same = {VMEM} bitcast(%near)",  # nothing
        f"  ROOT %y = {HBM} fusion(%same, %p), kind=kLoop, calls=%d",  # read and written
    ))  # fmt: skip
    assert moved == ONE + 2 * ONE


def test_a_copy_that_is_under_way_counts_once():
    moved = hbm_bytes(_module(
        f"  %p = {HBM} parameter(0)",
        f"  %start = ({VMEM}, {HBM}, u32[]{{:S(2)}}) copy-start(%p)",
        f"  %near = {VMEM} copy-done(%start)",
        f"  ROOT %y = {HBM} fusion(%near), kind=kLoop, calls=%c",
    ))  # fmt: skip
    assert moved == 2 * ONE


def test_what_a_kernel_reads_again_counts_again():
    moved = hbm_bytes(_module(
        f"  %p = {HBM} parameter(0)",
        f'  ROOT %y = {HBM} custom-call(%p), custom_call_target="tpu_custom_call", '
        f'backend_config={{"cost_estimate":{{"bytes_accessed":"{5 * ONE}"}}}}',
    ))  # fmt: skip
    assert moved == 5 * ONE


def test_a_loop_is_no_silent_zero():
    with pytest.raises(ValueError, match="is a loop"):
        hbm_bytes(_module(
            f"  %p = {HBM} parameter(0)",
            f"  ROOT %y = {HBM} while(%p), condition=%c, body=%b",
        ))  # fmt: skip
