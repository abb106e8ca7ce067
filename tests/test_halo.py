"""Time split over devices: what each computes of its steps and its halo, put together."""

import itertools

import numpy as np
import pytest

from conv_pallas.halo import apart, divisor, share
from conv_pallas.spec import OPERATIONS, ConvSpec, lhs_rhs_out
from tests.tolerance import REFERENCES

RATES = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 3), (2, 2)]  # S, E


def _specs(S: int, E: int):
    """Geometries of 12 S steps, of which each gives E / S outputs."""
    for K, D in ((1, 1), (2, 5), (3, 1), (3, 4), (4, 30)):
        span = (K - 1) * D + 1
        T = 12 * S
        total = span + (T * E // S - 1) * S - ((T - 1) * E + 1)
        for low in {0, 1, span // 2, span - 1, span + 3, -2}:
            for late in range(S):  # the last window need not end where the padding does
                spec = ConvSpec(T, K, S, (low, total - low + late), D, E)
                assert spec.out_time * S == T * E
                yield spec


def _piece(a, start, stop):
    """``a[:, start:stop]`` with zeros beyond the ends."""
    steps = np.arange(start, stop)
    there = (steps >= 0) & (steps < a.shape[1])
    return np.where(there[:, None], a[:, np.clip(steps, 0, a.shape[1] - 1)], 0)


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_the_shares_make_the_whole(rate):
    rng = np.random.default_rng(0)
    for spec, shards in itertools.product(_specs(*rate), (2, 3, 6)):
        assert divisor(spec) % shards == 0
        x, w = rng.standard_normal((2, spec.time, 2)), rng.standard_normal((spec.kernel_size, 2, 3))
        g = rng.standard_normal((2, spec.out_time, 3))
        for operation in OPERATIONS:
            lhs, rhs, _ = lhs_rhs_out(operation, x, w, g)
            length = lhs.shape[1] // shards
            left, right, local = share(operation, spec, shards)
            ways = {local: [(-left, length + right)]}
            if rate == (1, 1):
                offsets, local = apart(operation, spec, shards)
                ways[local] = [(offset, offset + length) for offset in offsets]
            want = REFERENCES[operation](lhs, rhs, spec)
            for local, pieces in ways.items():
                parts = []
                for i in range(shards):
                    seen = [_piece(lhs, i * length + a, i * length + b) for a, b in pieces]
                    part = g[:, i * spec.out_time // shards : (i + 1) * spec.out_time // shards]
                    its = part if operation == "conv1d_kernel_grad" else rhs
                    parts.append(REFERENCES[operation](np.concatenate(seen, 1), its, local))
                summed = operation == "conv1d_kernel_grad"
                whole = sum(parts) if summed else np.concatenate(parts, 1)
                np.testing.assert_allclose(whole, want, atol=1e-12, err_msg=f"{spec} {operation}")


def test_a_halo_is_what_the_field_reaches_and_no_more():
    causal = ConvSpec(64, 3, padding=(16, 0), kernel_dilation=8)
    assert share("conv1d", causal, 4)[:2] == (16, 0)
    assert share("conv1d_kernel_grad", causal, 4)[:2] == (16, 0)
    assert share("conv1d_input_grad", causal, 4)[:2] == (0, 16)
    same = ConvSpec(64, 4, padding=(12, 12), kernel_dilation=8)
    assert share("conv1d", same, 4)[:2] == share("conv1d_input_grad", same, 4)[:2] == (12, 12)
    # Beyond the far end of the sequence there is nothing to send for.
    assert share("conv1d", ConvSpec(64, 3, padding=(512, 0), kernel_dilation=256), 4)[:2] == (48, 0)
    strided = ConvSpec(64, 4, stride=4)
    assert share("conv1d", strided, 4)[:2] == share("conv1d_input_grad", strided, 4)[:2] == (0, 0)
    # Two inputs to a step: output 2 t + 1 sees x[t + 1] through the second tap, one ahead.
    upsampling = ConvSpec(64, 2, padding=(0, 2), input_dilation=2)
    assert share("conv1d", upsampling, 4)[:2] == (0, 1)


def test_time_stays_whole_where_x_and_y_have_other_rates():
    assert divisor(ConvSpec(64, 3)) == 1  # VALID: 62 outputs
    assert divisor(ConvSpec(64, 3, padding=(4, 4))) == 1
    assert divisor(ConvSpec(64, 3, stride=3, padding=(2, 0))) == 1
    assert divisor(ConvSpec(64, 4, stride=4)) == 16
    assert divisor(ConvSpec(13, 3, padding=(2, 0))) == 13
