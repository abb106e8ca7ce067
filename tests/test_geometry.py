"""hypothesis draws the geometry; values and both gradients against the formula."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st
from jax import lax

from conv_pallas.spec import ConvSpec
from tests.cases import Case
from tests.support import IMPLEMENTATIONS, check_operation, value_and_gradients


@st.composite
def cases(draw) -> Case:
    small = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    G, c, m = small(1, 4), small(1, 3), small(1, 3)
    if draw(st.booleans()):
        c = 1  # depthwise, with or without a multiplier
    K, D, S, T = small(1, 6), small(1, 7), small(1, 4), small(0, 24)
    numbers = st.one_of(
        st.integers(-3, 12),
        st.tuples(st.integers(-3, 12)).map(list),
        st.tuples(st.tuples(st.integers(-6, 12), st.integers(-6, 12))).map(list),
    )
    modes = st.sampled_from(["CAUSAL", "SAME", "SAME_LOWER", "VALID"])
    padding = draw(st.one_of(modes, numbers))
    E = 1 if isinstance(padding, str) else small(1, 4)
    batch = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    case = Case("drawn", batch, T, G * c, G * m, K, D, S, E, G, padding)
    try:
        case.spec  # noqa: B018
    except ValueError as e:
        hypothesis.assume("crop" not in str(e))
        raise
    return case


@pytest.mark.sampled
@hypothesis.given(cases())
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, case: Case):
    x, kernel, g = case.arrays()
    y, dx, dw = value_and_gradients(case, implementation)(x, kernel, g)
    check_operation(y, "conv1d", x, kernel, case)
    check_operation(dx, "conv1d_input_grad", g, kernel, case)
    check_operation(dw, "conv1d_kernel_grad", x, g, case)


def _lax_shape(case: Case, time: int) -> int:
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    padding = case.padding
    if padding == "CAUSAL":
        padding = [((case.K - 1) * case.D, 0)]
    elif isinstance(padding, int):
        padding = [(padding, padding)]
    elif isinstance(padding, list) and isinstance(padding[0], int):
        padding = [(padding[0], padding[0])]
    elif isinstance(padding, list):
        padding = [tuple(padding[0])]
    y = jax.eval_shape(
        lambda x, w: lax.conv_general_dilated(
            x, w, (case.S,), padding, (case.E,), (case.D,), ("NWC", "WIO", "NWC"), case.G
        ),
        struct(1, time, case.C),
        struct(*case.kernel_shape),
    )
    return y.shape[1]


@hypothesis.settings(max_examples=300)
@hypothesis.given(cases())
def test_out_time_is_that_of_lax(case: Case):
    assert case.spec.out_time == _lax_shape(case, case.T)


@hypothesis.settings(max_examples=300)
@hypothesis.given(cases())
def test_transposed(case: Case):
    """It maps T' steps to T, keeps the window, and twice transposed is the convolution."""
    spec: ConvSpec = case.spec
    hypothesis.assume(spec.out_time > 0)
    back = spec.transposed()
    assert back.time == spec.out_time
    assert (back.stride, back.input_dilation) == (spec.input_dilation, spec.stride)
    assert (back.span, back.groups) == (spec.span, spec.groups)
    # A stride leaves steps over at the end; with input dilation it may leave some T.
    if spec.time > 0:
        assert back.out_time == spec.time
        again = back.transposed()
        assert again.out_time == spec.out_time
        leftover = spec.padding[1] - again.padding[1]
        assert 0 <= leftover < spec.stride
        high = spec.padding[1] - leftover
        assert again == dataclasses.replace(spec, padding=(spec.padding[0], high))


@hypothesis.given(st.data())
def test_live_taps_are_those_that_see_a_step(data):
    integers = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    T, K, S, D, E = (integers(1, most) for most in (9, 6, 4, 7, 4))
    spec = ConvSpec(T, K, S, (integers(-6, 30), integers(-6, 30)), D, E)
    hypothesis.assume(spec.out_time > 0)
    sees = lambda k, u: 0 <= u * S + k * D - spec.padding[0] < spec.dilated_time  # noqa: E731
    live = {k for k in range(K) if any(sees(k, u) for u in range(spec.out_time))}
    assert live <= set(spec.live_taps) <= set(range(K))
    if S == 1:  # with a stride a tap may step over all of x
        assert live == set(spec.live_taps)
    if spec.live_taps:
        assert spec.of_taps(spec.live_taps).out_time == spec.out_time
