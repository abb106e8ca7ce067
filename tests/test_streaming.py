"""Streams: whatever the chunks, they compute what the full pass does, and in the same time."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from conv_pallas import streaming
from conv_pallas.nn import (
    TCN,
    Conv,
    ConvTranspose,
    TemporalBlock,
    compiled_step,
    replace_convs,
)
from tests.streams import check, functions, model_of, numbers, stream, with_tail

pytestmark = pytest.mark.usefixtures("hardly_optimized")

# Every pair of norm, activation, dilations, lookahead, chunks and batch is in one of the rows,
# or close to one: dilations smaller and larger than a chunk, chunks longer than the ring.
MATRIX = [
    (None, "relu", None, 0, (1,) * 18, 1),
    (None, "glu", (6, 2), 1, (18,), 2),
    (None, "gelu", (9, 2), 20, (7, 11), 3),
    ("weight", "relu", (2, 3), 12, (1,) * 18, 2),
    ("weight", "tanh", (1, 5), 0, (2, 16), 3),
    ("layer", "glu", (2, 2), 3, (7, 11), 2),
    ("layer", jnp.sin, None, 7, (1,) * 18, 1),
    ("batch", "silu", None, 7, (3,) * 6, 2),
    ("batch", "glu", (6, 2), 0, (1,) * 18, 3),
]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("number", "norm", "activation", "dilations", "lookahead", "chunks", "batch"),
    [(number, *row) for number, row in enumerate(MATRIX)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_equals_the_full_pass(number, norm, activation, dilations, lookahead, chunks, batch):
    model = model_of(
        norm=norm, activation=activation, dilations=dilations, lookahead=lookahead,
        skip_connections=number % 2 == 1,
    )  # fmt: skip
    check(model, numbers(batch, 18, 3), chunks)


@pytest.mark.sampled
@pytest.mark.parametrize(("mode", "lookahead"), [("add", 5), ("concat", 0)])
def test_conditions_segments_and_masks(mode, lookahead):
    model = model_of(
        conditioning=2, conditioning_mode=mode, lookahead=lookahead, skip_connections=True
    )
    x, condition = numbers(2, 18, 3), numbers(2, 18, 2, seed=7)
    ids = jnp.asarray([[0] * 4 + [1] * 9 + [2] * 5, [5] * 11 + [0] * 7])
    mask = jnp.arange(18) < jnp.asarray([[18], [13]])
    chunks = (7, 11)
    check(model, x, chunks, vector=numbers(2, 2, seed=7))
    check(model, x, chunks, condition=condition)
    hidden = jnp.where(mask[..., None], x, jnp.nan)
    check(model, hidden, chunks, condition=condition, segment_ids=ids, mask=mask)


@pytest.mark.sampled
@pytest.mark.parametrize("mode", ["add", "concat"])
@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("kind", ["network", "block"])
def test_a_condition_of_one_chunk_meets_the_steps_of_that_chunk(kind, lookahead, mode):
    """Late as they are; in every other chunk it is given for each step."""
    options = dict(conditioning=2, conditioning_mode=mode, lookahead=lookahead)
    model = model_of(**options)
    if kind == "block":
        model = TemporalBlock(3, 4, 3, 2, 0.0, nnx.Rngs(0), **options)
        model.eval()
    x, conditions, T = numbers(2, 20, 3), numbers(4, 2, 2, seed=7), 5
    whole, step = functions(model)
    expected = whole(x, condition=jnp.repeat(conditions.swapaxes(0, 1), T, axis=1))
    state, got = model.init_state(2), []
    for start, condition in zip(range(0, 20, T), conditions, strict=True):
        if start == T:
            condition = jnp.repeat(condition[:, None], T, axis=1)
        y, state = step(x[:, start : start + T], state, condition=condition)
        got.append(y)
    got = np.concatenate(got, 1)[:, lookahead:]
    np.testing.assert_allclose(got, expected[:, : 20 - lookahead], rtol=2e-5, atol=2e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_chunk_gives_its_last_real_step(lookahead):
    """As a call does where sequences end at different steps."""
    model = model_of(return_sequences=False, lookahead=lookahead)
    x, mask = numbers(2, 18, 3), jnp.arange(18) < jnp.asarray([[18], [13]])
    whole, step = functions(model)
    expected = whole(x, mask=mask)
    longer, cut = with_tail(lookahead, x, mask=mask)
    state = model.init_state(2)
    _, state = step(longer[:, :9], state, mask=cut["mask"][:, :9])
    y, _ = step(longer[:, 9:], state, mask=cut["mask"][:, 9:])
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_a_member_that_pauses_forgets_nothing(length):
    """A chunk without a real step of it, shorter or longer than the dilation or than the ring."""
    model = model_of(widths=(4,), dilations=(2,))
    mask = jnp.stack([jnp.ones(15, bool), (jnp.arange(15) < 5) | (jnp.arange(15) >= 5 + length)])
    check(model, numbers(2, 15, 3), (5, length, 10 - length), mask=mask)


@pytest.mark.sampled
@pytest.mark.parametrize("lookahead", [0, 3])
def test_a_layer_of_padding_too(lookahead):
    """What a call of a layer gives where the mask is False, its stream gives in any chunks."""
    one = Conv(3, 4, 3, padding=((4 - lookahead, lookahead),), kernel_dilation=2, rngs=nnx.Rngs(0))
    x, mask = numbers(1, 18, 3), jnp.arange(18)[None] % 7 % 4 != 2
    whole, step = functions(one)
    expected = np.asarray(whole(x, mask=mask))
    longer, cut = with_tail(lookahead, x, mask=mask)
    for chunks in ([1] * 18, [7, 11], [2] * 9):
        last = [lookahead] if lookahead else []
        got, _ = stream(step, one.init_state(1), longer, chunks + last, **cut)
        np.testing.assert_allclose(got[:, lookahead:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [
    dict(norm="weight", conditioning=2), dict(norm="layer", lookahead=5),
    dict(norm="batch", skip_connections=True, conditioning=2, conditioning_mode="concat"),
], ids=str)  # fmt: skip
def test_no_ranks_are_promoted(options):
    """Some users have JAX raise where they are, for all that they run."""
    model = model_of(**options)
    fixed = {"condition": numbers(2, 2)} if "conditioning" in options else {}
    x, packed = numbers(2, 18, 3), dict(
        mask=jnp.ones((2, 18), bool), segment_ids=jnp.zeros((2, 18), jnp.int32)
    )  # fmt: skip
    state = model.init_state(2)
    with jax.numpy_rank_promotion("raise"):
        for sequences in ({}, packed):
            jax.eval_shape(lambda x, **given: model(x, **fixed, **given), x, **sequences)
            for steps in (1, 18):
                part = {name: a[:, :steps] for name, a in sequences.items()}
                step = lambda x, state, **given: model.step(x, state, **fixed, **given)  # noqa: E731
                jax.eval_shape(step, x[:, :steps], state, **part)
        model.reset(state, jnp.asarray([True, False]))


# Integers are exact in float32: in whatever order they are added, equal terms give equal bits.
def whole_numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


@hypothesis.given(
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    restarts=st.sets(st.integers(0, 11), max_size=3),
)
@hypothesis.example(cuts=[4, 4, 1, 1, 2, 6], restarts={4})
@hypothesis.settings(max_examples=25)
def test_any_chunks_give_the_same_bits(cuts, restarts):
    """With members that restart between chunks: they then are at the start of a stream."""
    layer = Conv(2, 4, 3, kernel_dilation=4, padding="CAUSAL", feature_group_count=2,
                 rngs=nnx.Rngs(0))  # fmt: skip
    layer.kernel[...] = whole_numbers(*layer.kernel.shape)
    x = whole_numbers(2, sum(cuts), 2, seed=1)
    whole, step = functions(layer)
    state, at, out, began = layer.init_state(2), 0, [], 0
    for number, length in enumerate(cuts):
        if number in restarts:
            state = layer.reset(state, jnp.asarray([True, False]))
            began = at
        y, state = step(x[:, at : at + length], state)
        out.append(np.asarray(y))
        at += length
    got = np.concatenate(out, 1)
    # Of one length, so that all are compiled but once.
    padded = lambda x: jnp.pad(x, ((0, 0), (0, 72 - x.shape[1]), (0, 0)))  # noqa: E731
    np.testing.assert_array_equal(got[1:], whole(padded(x))[1:, :at])
    last = np.asarray(whole(padded(x[:, began:])))[:1, : at - began]
    np.testing.assert_array_equal(got[:1, began:], last)


def test_at_a_million_steps_as_at_the_start():
    """The clock is set forward; the stream that follows equals one that is young."""
    model = model_of(dilations=(3, 1))
    x = numbers(2, 60, 3)
    _, step = functions(model)
    young, state = stream(step, model.init_state(2), x, [20, 20, 20])
    _, old = stream(step, model.init_state(2), x[:, :20], [20])
    assert state["age"].tolist() == [60, 60]
    old = old | {"age": jnp.full(2, 2**30 - 3, jnp.int32)}  # the oldest that there is, soon
    out, old = stream(step, old, x[:, 20:], [20, 20])
    np.testing.assert_array_equal(out, young[:, 20:])
    assert old["age"].tolist() == [2**30] * 2

    @jax.jit
    def million(x):
        ring = {"past": jnp.zeros((1, 6, 1)), "index": jnp.zeros((), jnp.int32)}
        body = lambda t, ring: streaming.push(ring, x + t % 1000)  # noqa: E731
        return jax.lax.fori_loop(0, 1_000_000, body, ring)

    ring = million(jnp.zeros((1, 1, 1)))
    assert int(ring["index"]) == 1_000_000 % 6
    assert sorted(ring["past"].ravel().tolist()) == [994, 995, 996, 997, 998, 999]


def test_members_restart_one_by_one_without_a_trace():
    model = model_of(lookahead=4, dilations=(3, 1))
    x = numbers(2, 18, 3)
    _, step = functions(model)
    mask = jnp.ones((2, 9), bool)
    _, state = step(x[:, :9].at[0].set(jnp.nan), model.init_state(2), mask=mask)
    state = model.reset(state, jnp.asarray([True, False]))
    y, _ = step(x[:, 9:], state, mask=mask)
    fresh, _ = step(x[:, 9:], model.init_state(2), mask=mask)
    np.testing.assert_array_equal(y[0], fresh[0])
    assert not np.array_equal(y[1], fresh[1])
    for members, want in ((True, fresh), (False, y)):  # all or none
        np.testing.assert_array_equal(
            step(x[:, 9:], model.reset(state, members), mask=mask)[0], want
        )


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_batch_axes(batch):
    layer = Conv(3, 4, 3, kernel_dilation=2, padding=((3, 1),), rngs=nnx.Rngs(0))
    x, state, step, out = numbers(*batch, 9, 3), layer.init_state(batch), jax.jit(layer.step), []
    for part in (slice(4), slice(4, 9)):
        y, state = step(x[..., part, :], state)
        out.append(y)
    got = np.concatenate(out, -2)[..., 1:, :]
    np.testing.assert_allclose(got, layer(x)[..., :-1, :], rtol=1e-5, atol=1e-6)
    assert not layer.reset(state, np.ones(batch, bool))["age"].any()


def test_the_state_under_transforms():
    """jit, scan, vmap, and gradients through it: truncated backpropagation through time."""
    model = model_of(norm="weight", dilations=(3, 1))
    graph, variables, rest = nnx.split(model, nnx.Param, ...)
    x = numbers(2, 12, 3)
    step = lambda v, x, state: nnx.merge(graph, v, rest).step(x, state)  # noqa: E731

    @jax.jit
    def run(v, x):
        state = model.init_state(2)

        def body(state, x):
            y, state = step(v, x[:, None], state)
            return state, y[:, 0]

        _, scanned = jax.lax.scan(body, state, x.swapaxes(0, 1))
        many = jax.tree.map(lambda a: jnp.stack([a, a]), state)
        mapped, _ = jax.vmap(lambda x, s: step(v, x, s))(jnp.stack([x, 2 * x]), many)

        def loss(v, x):
            y1, state = step(v, x[:, :5], model.init_state(2))
            y2, _ = step(v, x[:, 5:], state)
            return jnp.sum(jnp.sin(jnp.concatenate([y1, y2], 1)))

        full = lambda v, x: jnp.sum(jnp.sin(nnx.merge(graph, v, rest)(x)))  # noqa: E731
        whole = nnx.merge(graph, v, rest)
        return (
            (scanned.swapaxes(0, 1), whole(x)),
            (mapped, jnp.stack([whole(x), whole(2 * x)])),
            (jax.grad(loss, (0, 1))(v, x), jax.grad(full, (0, 1))(v, x)),
        )

    for actual, expected in run(variables, x):
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            if jnp.issubdtype(jnp.result_type(a), jnp.floating):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["tanh", jnp.tanh, None])
def test_a_compiled_step_of_a_layer_takes_its_activation(activation):
    layer = Conv(3, 4, 3, padding="CAUSAL", rngs=nnx.Rngs(0))
    x = numbers(2, 6, 3)
    y, _ = compiled_step(layer)(x, layer.init_state(2), activation=activation)
    np.testing.assert_allclose(y, layer(x, activation=activation), rtol=1e-5, atol=1e-6)


def test_export_and_checkpoint_in_the_middle_of_a_stream(tmp_path):
    model = model_of(norm="weight", lookahead=2)
    x = numbers(2, 12, 3)
    exported = jax.export.deserialize(
        jax.export.export(jax.jit(lambda x, s: model.step(x, s)))(
            x[:, :4], model.init_state(2)
        ).serialize()
    )
    _, step = functions(model)
    expected, _ = stream(step, model.init_state(2), x, [4, 4, 4])
    got, state = stream(exported.call, model.init_state(2), x[:, :8], [4, 4])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "stream", {"model": nnx.state(model), "stream": state})
        checkpointer.wait_until_finished()
        blank = {"model": nnx.state(model), "stream": model.init_state(2)}
        restored = checkpointer.restore(tmp_path / "stream", blank)
    other = model_of(norm="weight", lookahead=2, seed=5)
    nnx.update(other, restored["model"])
    rest, _ = functions(other)[1](x[:, 8:], restored["stream"])
    np.testing.assert_allclose(got, expected[:, :8], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rest, expected[:, 8:], rtol=1e-5, atol=1e-6)


def test_a_step_copies_no_ring():
    """What makes it cost the same for any receptive field, read from the compiled program."""
    x, work = jnp.ones((1, 1, 8)), []
    for dilation in (30, 3000):
        model = TCN(8, [8], 8, 3, 0.0, dilations=[dilation])
        model.eval()
        compiled = jax.jit(model.step, donate_argnums=1).lower(x, model.init_state(1)).compile()
        ring = rf"f32\[1,{2 * dilation},8\]"
        assert re.search(ring, compiled.as_text())
        copies = rf"= {ring}\S* (copy|select|concatenate|pad|gather|scatter)\("
        assert not re.search(copies, compiled.as_text())
        work.append(compiled.cost_analysis()["flops"])
    assert work[0] == work[1]  # nothing is done to each row
    # And a stream that runs stays where it is.
    step, state = compiled_step(model), model.init_state(1)
    before = state["block0"]["conv1"]["past"].unsafe_buffer_pointer()
    _, state = step(x, state)
    assert state["block0"]["conv1"]["past"].unsafe_buffer_pointer() == before


def test_a_state_that_was_used_up_is_told():
    model = TCN(3, [4], 2, rngs=nnx.Rngs(0))
    model.eval()
    step, state, x = compiled_step(model), model.init_state(1), jnp.ones((1, 2, 3))
    _, later = step(x, state)
    with pytest.raises(ValueError, match=r"^this state was used up by a step before: take the one"):
        step(x, state)
    with pytest.raises(ValueError, match="used up"):  # of a part of it too
        step(x, later | {"block0": state["block0"]})
    step(x, later)
    with pytest.raises(TypeError):  # which is no such error
        step(x, model.init_state(1), nonsense=1)


def test_a_step_that_has_its_state_elsewhere_is_told():
    """Before anything is donated that is no state."""

    class Late(nnx.Module):
        def __init__(self):
            self.conv = Conv(3, 3, 2, padding="CAUSAL", rngs=nnx.Rngs(0))

        def step(self, x, by, state):
            y, state = self.conv.step(x, state)
            return y * by, state

    model, x, by = Late(), numbers(1, 4, 3), jnp.ones((1, 4, 3))
    with pytest.raises(ValueError, match=r"step must take \(x, state, ...\) .* Late's was given"):
        compiled_step(model)(x, by, model.conv.init_state(1))
    assert not by.is_deleted()


def test_a_compiled_step_takes_what_the_step_takes():
    class Scaled(nnx.Module):
        """As a model of one's own, whose inputs are not all sequences."""

        def __init__(self):
            self.conv = Conv(3, 3, 2, padding="CAUSAL", rngs=nnx.Rngs(0))

        def init_state(self, batch_size):
            return {"conv": self.conv.init_state(batch_size)}

        def step(self, x, state, by, plus=0.0):
            y, conv = self.conv.step(x, state["conv"])
            return y * by + plus, {"conv": conv}

    model, x = Scaled(), numbers(1, 4, 3)
    y, _ = compiled_step(model)(x, model.init_state(1), 2.0, plus=jnp.ones(3))
    np.testing.assert_allclose(y, 2 * model.conv(x) + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", ["xla", "xla_native"])
def test_blocks_layers_and_dtypes(implementation):
    block = TemporalBlock(3, 4, 2, 5, 0.0, nnx.Rngs(0), implementation=implementation)
    x = numbers(2, 16, 3)
    whole, step = functions(block)
    got, _ = stream(step, block.init_state(2), x, [1, 15])
    np.testing.assert_allclose(got, whole(x), rtol=1e-5, atol=1e-6)
    layer = Conv(3, 4, 3, padding=((3, 1),), kernel_dilation=2, dtype=jnp.bfloat16,
                 implementation=implementation, rngs=nnx.Rngs(0))  # fmt: skip
    whole, step = functions(layer)
    got, state = stream(step, layer.init_state(2), x, [1, 15])
    assert got.dtype == state["past"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got[:, 1:].astype(float), np.asarray(whole(x))[:, :-1].astype(float), rtol=0.02, atol=0.02
    )
    narrow = Conv(3, 4, 3, padding="CAUSAL", param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"^x is computed with in float32, .* dtype=float32\)$"):
        narrow.step(x, narrow.init_state(2))
    narrow.step(x, narrow.init_state(2, jnp.float32))
    # Flax's own WeightNorm has scales of float32 around a kernel of any dtype.
    model = TCN(3, [4, 4], 2, norm="weight", param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model.eval()
    for dtype in (jnp.bfloat16, jnp.float32):
        y, _ = jax.eval_shape(model.step, x.astype(dtype), model.init_state(2, dtype))
        assert y.dtype == dtype


@pytest.mark.sampled
@pytest.mark.parametrize("norm", ["weight", "layer", "batch"])
@pytest.mark.parametrize("given", [jnp.bfloat16, jnp.float32])
def test_each_part_has_its_own_dtype(norm, given):
    """Of a model of bfloat16 what comes after a batch norm's running averages is float32."""
    model = model_of(
        widths=(4, 6), norm=norm, param_dtype=jnp.bfloat16, lookahead=3,
        skip_connections=True, conditioning=2,
    )  # fmt: skip
    whole, step = functions(model)
    x, condition = numbers(2, 24, 3).astype(given), numbers(2, 24, 2, seed=5).astype(given)
    state = model.init_state(2, given)
    got, after = stream(step, state, x, [3, 21], condition=condition)
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, state)
    if norm == "batch":
        assert state["block0"]["conv2"]["past"].dtype == jnp.float32
    want = whole(x, condition=condition)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
        got[:, 3:].astype(float), np.asarray(want)[:, :-3].astype(float), rtol=0.02, atol=0.03
    )


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_narrower_block_is_as_narrow_in_a_stream(lookahead):
    """What it adds to wide inputs is of its own dtype, whether or not it waits for that."""
    block = TemporalBlock(3, 3, 2, 1, 0.0, nnx.Rngs(0), dtype=jnp.bfloat16, lookahead=lookahead)
    x = numbers(2, 12, 3) + 100
    whole, step = functions(block)
    longer, cut = with_tail(lookahead, x)
    got, _ = stream(step, block.init_state(2), longer, [12 + lookahead], **cut)
    expected = whole(x)
    assert got.dtype == expected.dtype == jnp.bfloat16
    got, expected = (np.asarray(a, float) for a in (got[:, lookahead:], expected))
    np.testing.assert_allclose(got, expected, rtol=0.01)


def test_a_wide_condition_waits_in_a_narrow_state():
    model = model_of(dtype=jnp.bfloat16, conditioning=2, lookahead=3)
    state, x, condition = model.init_state(2), numbers(2, 5, 3), numbers(2, 5, 2)
    y, after = jax.eval_shape(lambda c: model.step(x, state, condition=c), condition)
    assert y.dtype == model(x, condition=condition).dtype == jnp.bfloat16
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def layer(taps):
    return Conv(3, 3, taps, padding="CAUSAL", rngs=nnx.Rngs(0))


def training(**options):
    model = model_of(**options)
    model.train()
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: m.step(jnp.ones((2, 4, 5)), s), "x must be a chunk of shape (2, steps, 3)"),
        (lambda m, s: m.step(jnp.ones((2, 0, 3)), s), "x must be a chunk of shape (2, steps, 3)"),
        (lambda m, s: m.step(jnp.ones((3, 4, 3)), s), "state is of batch (2,), but x has batch (3"),
        (lambda m, s: m.step(jnp.ones((2, 4, 3)), None), "state must be what init_state or the"),
        (lambda m, s: m.reset({}, True), "state must be what init_state or the"),
        (lambda m, s: model_of(widths=(4,)).step(jnp.ones((2, 4, 3)), layer(3).init_state(2)),
         "state must be of this model, from its init_state; it has no 'block0'"),
        (lambda m, s: m.step(jnp.ones((2, 4, 3)), model_of(widths=(4,)).init_state(2)),
         "state must be of this model, from its init_state; it has no 'block1'"),
        (lambda m, s: model_of(widths=(4,)).step(jnp.ones((2, 4, 3)), s),
         "state must be of this model, from its init_state; it has a 'block1'"),
        (lambda m, s: model_of(lookahead=1).step(jnp.ones((2, 4, 3)), s),
         "state must be of this layer, from its init_state: of 2 rows of 3 channels with ages"),
        (lambda m, s: layer(3).step(jnp.ones((2, 4, 3)), layer(5).init_state(2)),
         "state must be of this layer, from its init_state: of 2 rows of 3 channels, got 4 of 3"),
        (lambda m, s: layer(3).step(jnp.ones((2, 4, 3)), layer(1).init_state(2)),
         "state must be of this layer, from its init_state: of 2 rows of 3 channels, got 0 of 3"),
        (lambda m, s: compiled_step(nnx.Conv(3, 3, 3, rngs=nnx.Rngs(0))),
         "only what has a step can stream, such as Conv, ConvTranspose, TemporalBlock or TCN of c"),
        (lambda m, s: m.init_state(0), "batch_size must be an int of 1 or more or a tuple"),
        (lambda m, s: m.reset(s, jnp.ones(3, bool)), "members must be bool of shape (2,)"),
        (lambda m, s: model_of(causal=False).init_state(2), "only a causal model can stream"),
        (lambda m, s: model_of(causal=False).step(jnp.ones((2, 4, 3)), s), "only a causal model"),
        (lambda m, s: model_of(conv=nnx.Conv).init_state(2),
         "only layers of conv_pallas.nn.Conv can stream, got flax.nnx.nn.linear.Conv"),
        (lambda m, s: training(norm="batch").init_state(2), "batch norm streams in eval mode"),
        (lambda m, s: compiled_step(training()), "the model has dropout, and is in training"),
        (lambda m, s: Conv(3, 3, 3, rngs=nnx.Rngs(0)).init_state(2), "only a causal layer can"),
        (lambda m, s: Conv(3, 3, 3, padding=(2, 0), rngs=nnx.Rngs(0)).init_state(2), "padding m"),
        (lambda m, s: Conv(3, 3, 1, padding="no", rngs=nnx.Rngs(0)).init_state(2), "padding must"),
        (lambda m, s: Conv(3, 3, (3, 3), rngs=nnx.Rngs(0)).init_state(2), "only a 1-D layer"),
        (lambda m, s: m.step(jnp.ones((2, 4, 3)), s, mask=jnp.ones(4)), "mask must be bool of sh"),
        (lambda m, s: m.step(jnp.ones((2, 4, 3)), s, segment_ids=jnp.ones(4)), "segment_ids must"),
        (lambda m, s: m.step(jnp.ones((2, 4, 3)), s, condition=jnp.ones((2, 1))), "the model tak"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_errors_in_one_line(call, message):
    model = model_of()
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        call(model, model.init_state(2))
    assert "\n" not in str(error.value)


class OwnCall:
    def __call__(self, x):
        return jax.nn.sigmoid(super().__call__(x))


class OwnStep(OwnCall):
    def step(self, x, state):
        y, state = super().step(x, state)
        return jax.nn.sigmoid(y), state


CAUSAL = dict(padding="CAUSAL", rngs=nnx.Rngs(0))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("base", "arguments"),
    [
        (Conv, (3, 4, 3)), (ConvTranspose, (3, 4, 3)), (TemporalBlock, (3, 4, 3, 1, 0.0)),
        (TCN, (3, [4], 2)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_call_of_ones_own_streams_with_a_step_of_ones_own(base, arguments):
    """Its base's step would compute something else, and say nothing."""
    options = CAUSAL if issubclass(base, nnx.Conv | nnx.ConvTranspose) else {"rngs": nnx.Rngs(0)}
    make = lambda own: type("Own", (own, base), {})(*arguments, **options)  # noqa: E731
    model, x = make(OwnCall), numbers(2, 8, 3)
    model.eval()
    state = base(*arguments, **options).init_state(2)
    for call in (lambda: model.init_state(2), lambda: model.step(x, state)):
        message = f"OwnCall has a __call__ of its own, which the step of {base.__name__} does not"
        with pytest.raises(ValueError, match=message):
            call()
    again = type("Again", (OwnStep,), {"__call__": lambda self, x: super(OwnStep, self)(x)})
    with pytest.raises(ValueError, match="Again has a __call__ of its own, which the step of Own"):
        make(again).init_state(2)
    beside = type("Beside", (OwnCall, type("Step", (), {"step": OwnStep.step})), {})
    for own in (OwnStep, type("Whole", (OwnStep,), {})):
        model = make(own)
        model.eval()
        got, _ = stream(model.step, model.init_state(2), x, [3, 5])
        np.testing.assert_allclose(got, model(x), rtol=1e-5, atol=1e-6)
    make(beside).init_state(2)  # of two classes that know nothing of each other


@pytest.mark.parametrize("make", [Conv, ConvTranspose])
@pytest.mark.parametrize("wide", ["mask", "bias"])
def test_the_state_is_as_wide_as_what_a_call_computes_in(make, wide):
    x = numbers(2, 8, 3).astype(jnp.bfloat16)
    mask = jnp.ones((3, 3, 4)) if wide == "mask" else None
    layer = make(3, 4, 3, param_dtype=jnp.bfloat16, mask=mask, **CAUSAL)
    if wide == "bias":
        layer.bias.set_value(numbers(4))
    expected = layer(x)
    assert expected.dtype == jnp.float32
    for dtype in (None, jnp.bfloat16):
        got, _ = stream(layer.step, layer.init_state(2, dtype), x, [3, 5])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_export_of_chunks_of_any_length():
    layer = Conv(3, 4, 5, kernel_dilation=2, **CAUSAL)
    state = layer.init_state(2)
    chunk = jax.ShapeDtypeStruct(jax.export.symbolic_shape("2, steps, 3"), jnp.float32)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    exported = jax.export.export(jax.jit(layer.step))(chunk, shapes)
    x = numbers(2, 18, 3)
    got, _ = stream(exported.call, state, x, [1, 2, 12, 3])
    np.testing.assert_allclose(got, layer(x), rtol=1e-5, atol=1e-6)


def test_a_weight_normed_network_of_stock_layers_streams_once_they_are_replaced():
    model = TCN(3, [4, 4], 2, 3, norm="weight", conv=nnx.Conv, rngs=nnx.Rngs(0))
    model.eval()
    x = numbers(2, 18, 3)
    y = model(x)
    replace_convs(model)
    check(model, x, (7, 11))
    np.testing.assert_allclose(model(x), y, rtol=1e-4, atol=1e-5)


def test_a_replaced_weight_norm_takes_what_flaxs_takes():
    block = TemporalBlock(4, 4, 3, 1, 0.0, nnx.Rngs(0), norm="weight", conv=nnx.Conv)
    x = jnp.ones((2, 9, 4))
    before = block.conv1(x, None)
    replace_convs(block)
    np.testing.assert_allclose(block.conv1(x, None), before, rtol=1e-5)


def test_a_scale_that_is_wider_than_its_kernel_widens_the_state():
    block = TemporalBlock(4, 4, 3, 1, 0.0, nnx.Rngs(0), norm="weight", param_dtype=jnp.bfloat16)
    for layer in (block.conv1, block.conv2):
        for name in layer.scales:  # which are no Params with the oldest flax
            layer.scales[name] = nnx.Param(jnp.ones(4))
    x = jnp.ones((2, 9, 4), jnp.bfloat16)
    for dtype in (None, jnp.bfloat16):
        y, _ = jax.eval_shape(block.step, x, block.init_state(2, dtype))
        assert y.dtype == jax.eval_shape(block, x).dtype == jnp.float32


def test_chunks_under_strict_promotion():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        layer = Conv(4, 4, 3, padding="CAUSAL", kernel_dilation=4, rngs=nnx.Rngs(0))
        y, _ = layer.step(jnp.ones((2, 3, 4), jnp.float32), layer.init_state(2))
        assert y.dtype == jnp.float32
