"""`Conv` under the transforms of nnx, its checkpoints, and `replace_convs`."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from conv_pallas.nn import Conv, ConvTranspose, replace_convs
from tests.support import tree_close

X = np.random.default_rng(0).standard_normal((4, 9, 4)).astype(np.float32)
KNOBS = dict(padding="CAUSAL", kernel_dilation=2)


def _init(key, shape, dtype):
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape).astype(dtype))


def _layer(cls=Conv, features=(4, 4), seed=0, **kwargs):
    kwargs = dict(kernel_init=_init, bias_init=_init) | KNOBS | kwargs
    return cls(*features, 3, rngs=nnx.Rngs(seed), **kwargs)


# --- Transforms ---


def _loss(layer, x):
    return jnp.sum(jnp.sin(layer(x)))


def _remat(layer, x):
    return nnx.value_and_grad(nnx.remat(_loss))(layer, x)


def _scan(layer, x):
    """Three layers of stacked parameters, one after the other, and the gradient to them."""
    graphdef, state = nnx.split(layer)
    stacked = nnx.merge(graphdef, jax.tree.map(lambda a: jnp.stack([a, -a, 2 * a]), state))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return jnp.tanh(layer(x))

    return nnx.value_and_grad(lambda m, x: jnp.sum(forward(m, x)))(stacked, x)


def _vmap(layer, x):
    """A layer for each example."""
    graphdef, state = nnx.split(layer)
    many = nnx.merge(graphdef, jax.tree.map(lambda a: jnp.stack([a, -a, 2 * a, a]), state))
    return nnx.vmap(nnx.grad(_loss), in_axes=(0, 0))(many, x)


def _split_merge(layer, x):
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    return jax.grad(lambda params: _loss(nnx.merge(graphdef, params, rest), x))(params)


TRANSFORMS = {
    "jit": lambda layer, x: layer(x),
    "grad": nnx.grad(_loss),
    "value_and_grad": nnx.value_and_grad(_loss),
    "grad_of_both": nnx.grad(_loss, argnums=(0, 1)),
    "vmap_inputs": lambda layer, x: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(layer, x),
    "vmap_layers": _vmap,
    "scan": _scan,
    "remat": _remat,
    "split_merge": _split_merge,
    "clone": lambda layer, x: nnx.clone(layer)(x),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    run = nnx.jit(TRANSFORMS[name])
    got, want = run(_layer(Conv), X), run(_layer(nnx.Conv), X)
    tree_close(jax.tree.leaves(got), jax.tree.leaves(want), rtol=1e-4)


@pytest.mark.parametrize("implementation", [None, "xla", ("triton", "xla")])
def test_eval_shape_and_split_keep_the_order(implementation):
    layer = _layer(implementation=implementation)
    abstract = nnx.eval_shape(lambda: _layer(implementation=implementation))
    assert type(abstract) is Conv
    assert abstract.implementation == layer.implementation
    assert abstract.kernel.shape == (3, 4, 4)
    merged = nnx.merge(nnx.graphdef(abstract), nnx.state(layer))
    assert merged.implementation == layer.implementation
    assert type(nnx.clone(layer)) is Conv
    np.testing.assert_array_equal(merged(X), layer(X))
    assert nnx.graphdef(abstract) == nnx.graphdef(layer)


def test_a_training_step_changes_only_numbers():
    layer = _layer()
    before = nnx.graphdef(layer)
    traced = []

    @nnx.jit
    def step(layer, x):
        traced.append(x)
        params, grads = nnx.state(layer, nnx.Param), nnx.grad(_loss)(layer, x)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))

    kernel = layer.kernel[...]
    step(layer, X)
    step(layer, X)
    assert len(traced) == 1
    assert nnx.graphdef(layer) == before
    assert np.abs(layer.kernel[...] - kernel).max() > 0


def test_pickles():
    layer = _layer(implementation="xla")
    graphdef, state = nnx.split(layer)
    again = nnx.merge(pickle.loads(pickle.dumps(graphdef)), state)
    assert type(again) is Conv
    np.testing.assert_array_equal(again(X), layer(X))


# --- Checkpoints ---


@pytest.mark.parametrize(("saved", "loaded"), [(nnx.Conv, Conv), (Conv, nnx.Conv)])
def test_checkpoint_of_one_restores_into_the_other(saved, loaded, tmp_path):
    class Model(nnx.Module):
        def __init__(self, cls, seed):
            init = nnx.initializers.normal()
            self.convs = nnx.List([_layer(cls, seed=seed + i, kernel_init=init) for i in range(2)])

        def __call__(self, x):
            for conv in self.convs:
                x = conv(x)
            return x

    source, target = Model(saved, seed=1), Model(loaded, seed=5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(source))
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(target))
        nnx.update(target, checkpointer.restore(tmp_path / "state", abstract))
    for a, b in zip(source.convs, target.convs, strict=True):
        np.testing.assert_array_equal(a.kernel[...], b.kernel[...])
        np.testing.assert_array_equal(a.bias[...], b.bias[...])
    tree_close(target(X), source(X), rtol=1e-4)


# --- replace_convs ---


class Own(nnx.Conv):
    """A subclass that means something else by a call."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Nested(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.shared = _layer(nnx.Conv)
        self.again = self.shared
        self.list = nnx.List([_layer(nnx.Conv, seed=1), nnx.Linear(4, 4, rngs=rngs)])
        self.dict = nnx.Dict(a=_layer(nnx.Conv, seed=2), b=nnx.BatchNorm(4, rngs=rngs))
        self.sequential = nnx.Sequential(_layer(nnx.Conv, seed=3), nnx.relu)
        self.plane = nnx.Conv(1, 1, (2, 2), rngs=rngs)
        self.own = _layer(Own, seed=4)
        self.ours = _layer(Conv, seed=5, implementation="xla_native")
        self.mine = _layer(nnx.Conv, seed=6, use_bias=False, feature_group_count=2)
        self.up = nnx.ConvTranspose(4, 4, 4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.again(self.shared(x))
        for module in self.list:
            x = module(x)
        x = self.dict["b"](self.dict["a"](x))
        x = self.sequential(x) + self.plane(x[..., None])[..., 0]
        return self.up(self.mine(self.ours(self.own(x))))


def test_replaces_in_nested_models():
    stock, model = Nested(), Nested()
    graph_paths = nnx.to_flat_state(nnx.state(model)).paths
    shared, kernel = model.shared, model.list[0].kernel

    assert replace_convs(model, implementation="xla") is model

    replaced = [model.shared, model.list[0], model.dict["a"], model.sequential.layers[0]]
    for layer in [*replaced, model.plane, model.ours, model.mine]:
        assert type(layer) is Conv
        assert layer.implementation == ("xla",)
    assert type(model.up) is ConvTranspose and model.up.implementation == ("xla",)
    assert type(model.own) is Own
    assert type(model.list[1]) is nnx.Linear
    assert model.shared is model.again is shared
    assert model.list[0].kernel is kernel
    assert nnx.to_flat_state(nnx.state(model)).paths == graph_paths
    run = nnx.jit(nnx.value_and_grad(lambda m, x: jnp.sum(jnp.sin(m(x)))))
    got, want = (jax.tree.leaves(run(m, X)) for m in (model, stock))
    assert [a.shape for a in got] == [a.shape for a in want]
    # As one vector: a bias before BatchNorm has a gradient of zero, up to rounding.
    tree_close(*(np.concatenate([np.ravel(a) for a in t]) for t in (got, want)), rtol=1e-4)
    # BatchNorm's statistics have moved alike.
    tree_close(model.dict["b"].mean[...], stock.dict["b"].mean[...], rtol=1e-4)


def test_replaces_the_model_itself_and_takes_orders_back():
    layer = _layer(nnx.Conv)
    structure = nnx.graphdef(_layer(Conv))
    assert replace_convs(layer) is layer
    assert type(layer) is Conv
    assert nnx.graphdef(layer) == structure
    replace_convs(layer, implementation=["triton", "xla"])
    assert layer.implementation == ("triton", "xla")
    replace_convs(layer)
    assert layer.implementation is None
    assert nnx.graphdef(layer) == structure


def test_replaces_under_weight_norm():
    make = lambda: nnx.WeightNorm(_layer(nnx.Conv), rngs=nnx.Rngs(0))  # noqa: E731
    stock, model = make(), make()
    replace_convs(model)
    assert type(model.layer_instance) is Conv
    run = nnx.jit(nnx.value_and_grad(_loss))
    tree_close(jax.tree.leaves(run(model, X)), jax.tree.leaves(run(stock, X)), rtol=1e-4)


def test_weight_norm_around_conv():
    wrap = lambda cls: nnx.WeightNorm(_layer(cls), rngs=nnx.Rngs(0))  # noqa: E731
    run = nnx.jit(nnx.value_and_grad(_loss))
    tree_close(
        jax.tree.leaves(run(wrap(Conv), X)), jax.tree.leaves(run(wrap(nnx.Conv), X)), rtol=1e-4
    )


def test_replaces_in_an_abstract_model():
    """As one does before a checkpoint is restored into it."""
    model = replace_convs(nnx.eval_shape(Nested))
    assert type(model.shared) is Conv
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_sharded_layer_and_out_sharding():
    """`out_sharding` and the sharding in `kernel_metadata` are flax's."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        outs = []
        for cls in (Conv, nnx.Conv):
            layer = _layer(cls, kernel_init=nnx.initializers.ones, bias_init=nnx.initializers.ones)
            x = jax.device_put(X, jax.NamedSharding(mesh, P("a")))
            outs.append(jax.jit(lambda x, layer=layer: layer(x, out_sharding=P("a", None, "b")))(x))
        assert outs[0].sharding == outs[1].sharding
    tree_close(*(np.asarray(y) for y in outs), rtol=1e-4)


def test_replaces_in_a_list_of_modules():
    layers = [_layer(nnx.Conv), nnx.Linear(4, 4, rngs=nnx.Rngs(0))]
    assert type(replace_convs(layers)[0]) is Conv
