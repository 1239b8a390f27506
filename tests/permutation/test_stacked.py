"""Tests that every layer of a stack is permuted, and matched, on its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dimat_jax import merge, permutation
from dimat_jax.matching import (
    activation_matching,
    joint_activation_matching,
    joint_weight_matching,
    weight_matching,
)
from dimat_jax.permutation import (
    PermutationSpec,
    PermutationSpecError,
    Stack,
    derive,
    group_shapes,
    validate,
    verify,
)
from dimat_jax.tree import flatten, map_with_path

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


class Program(NamedTuple):
    """A model with stacked layers, and the shapes of its permutations."""

    forward: Callable[[Any, Any], Any]
    variables: Any
    inputs: Any
    shapes: list[tuple[int, ...]]


def drawn(shapes: Any) -> Any:
    """Variables without constants: a new model's scales and biases are constant."""
    return map_with_path(lambda p, x: normal(*x.shape, seed=len(p)) / 2, shapes)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4)(nn.gelu(nn.Dense(7)(nn.LayerNorm()(x)))), None


class AttentionBlock(nn.Module):
    """Two heads of three dimensions; one dense layer makes queries, keys, values."""

    @nn.compact
    def __call__(self, x, _):
        qkv = nn.DenseGeneral((3, 2, 3))(nn.RMSNorm()(x))
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        y = jax.nn.dot_product_attention(q, k, v)
        return x + nn.DenseGeneral(4, axis=(-2, -1))(y), None


class Scanned(nn.Module):
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(self.block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(2)(layers()(nn.Dense(4)(x), None)[0])


def linen(module: nn.Module, inputs: jax.Array, shapes) -> Program:
    variables = drawn(jax.eval_shape(module.init, KEY, inputs))
    return Program(module.apply, variables, inputs, shapes)


def equinox_scan() -> Program:
    """A scan over layers that `filter_vmap` has made, as Equinox's FAQ advises."""

    @eqx.filter_vmap
    def make(key):
        return eqx.nn.MLP(4, 4, width_size=6, depth=1, key=key)

    layers, static = eqx.partition(make(jax.random.split(KEY, 3)), eqx.is_array)

    def forward(layers, x):
        def step(h, layer):
            return h + eqx.combine(layer, static)(h), None

        return jax.vmap(lambda one: lax.scan(step, one, layers)[0])(x)

    return Program(forward, drawn(layers), normal(16, 4), [(3, 6)])


def ensemble() -> Program:
    """Members of an ensemble; all of their outputs count."""
    variables = {"in": normal(3, 4, 6), "b": normal(3, 6), "out": normal(3, 6, 2)}

    def member(v, x):
        return jnp.tanh(x @ v["in"] + v["b"]) @ v["out"]

    def forward(v, x):
        return jax.vmap(member, (0, None))(v, x)

    return Program(forward, variables, normal(16, 4), [(3, 6)])


def convolutions() -> Program:
    """Members that are convolutional; JAX makes one grouped convolution of them."""
    variables = {
        "one": normal(3, 3, 2, 6),
        "two": normal(3, 3, 6, 5),
        "w": normal(5, 2),
    }

    def member(one, two, x):
        for kernel in (one, two):
            dims = ("NWC", "WIO", "NWC")
            x = jnp.tanh(
                lax.conv_general_dilated(x, kernel, (1,), "SAME", None, None, dims)
            )
        return x

    def forward(v, x):
        maps = jax.vmap(member, (0, 0, None))(v["one"], v["two"], x)
        return maps.mean(2) @ v["w"]

    return Program(forward, variables, normal(8, 6, 2), [(3, 6), (5,)])


def experts() -> Program:
    """Each example goes to the expert with the largest gate."""
    variables = {
        "gate": normal(4, 3),
        "up": normal(3, 4, 6),
        "down": normal(3, 6, 4),
        "head": normal(4, 2),
    }

    def forward(v, x):
        chosen = jax.nn.one_hot((x @ v["gate"]).argmax(-1), 3)
        hidden = jax.nn.gelu(jnp.einsum("bi,eih->beh", x, v["up"]))
        y = jnp.einsum("be,beh,eho->bo", chosen, hidden, v["down"])
        return y @ v["head"]

    return Program(forward, variables, normal(16, 4), [(3, 6), (4,)])


PROGRAMS: dict[str, Callable[[], Program]] = {
    "nn.scan": lambda: linen(Scanned(Block), normal(16, 5), [(4,), (3, 7)]),
    # The stream; in each layer the heads, and the dimensions of each head.
    "nn.scan over attention": lambda: linen(
        Scanned(AttentionBlock), normal(8, 5, 5), [(4,), (3, 2), (3, 3)]
    ),
    "equinox": equinox_scan,
    "ensemble": ensemble,
    "ensemble of convolutions": convolutions,
    "experts": experts,
}

FAST = {"nn.scan", "ensemble", "experts"}
programs = pytest.mark.parametrize(
    "name",
    [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in PROGRAMS],
)


# A choice of the largest gate tells experts apart by their places, and derive says so.
@pytest.mark.every_nth(3)
@pytest.mark.filterwarnings("ignore::dimat_jax.permutation.PermutationSpecWarning")
@programs
def test_every_layer_has_permutations_of_its_own_and_they_are_found(name):
    forward, a, x, shapes = PROGRAMS[name]()
    spec, activations = derive(forward, a, x, strict=True, with_activations=True)
    assert sorted(group_shapes(spec, a).values()) == sorted(shapes)
    validate(spec, a)
    assert permutation.spec_from_json(permutation.spec_to_json(spec)) == spec
    assert all(spec.taps_of(group) for group in spec.groups)

    planted = permutation.random(spec, a, jax.random.key(1))
    b = permutation.apply(spec, planted, a)
    assert any((perm[0] != perm[1]).any() for perm in planted.values() if perm.ndim > 1)
    before, after = forward(a, x), forward(b, x)
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
    for taps in (activations(a, x), activations(b, x)):
        assert taps.keys() == spec.taps.keys()

    inputs = normal(200, *x.shape[1:], seed=2)
    by_weights = weight_matching(spec, a, b, key=KEY, restarts=4)
    by_activations = activation_matching(spec, activations, a, b, [inputs])
    inverse = permutation.invert(planted)
    for found in (by_weights, by_activations):
        for group, perm in inverse.items():
            np.testing.assert_array_equal(found[group], perm, err_msg=group)
    merged = merge.average([a, permutation.apply(spec, by_weights, b)])
    for path, leaf in flatten(merged).items():
        np.testing.assert_allclose(leaf, flatten(a)[path], rtol=1e-6)


def test_jointly_matched_networks_agree_in_every_layer():
    forward, a, x, _ = ensemble()
    spec, activations = derive(forward, a, x, with_activations=True)
    planted = [permutation.random(spec, a, jax.random.key(i)) for i in range(2)]
    identity = np.tile(np.arange(6), (3, 1))
    networks = [a, *(permutation.apply(spec, p, a) for p in planted)]
    for found in (
        joint_weight_matching(spec, networks, key=KEY),
        joint_activation_matching(spec, activations, networks, [normal(200, 4)]),
    ):
        for perms, own in zip(found[1:], planted, strict=True):
            for group, perm in permutation.compose(own, perms).items():
                np.testing.assert_array_equal(perm, identity, group)


def test_members_that_could_be_permuted_have_their_own_units_if_they_are_kept():
    forward, a, x, _ = ensemble()

    def mean(v, x):
        return forward(v, x).mean(0)

    spec = derive(mean, a, x)
    assert sorted(group_shapes(spec, a).values()) == [(3,), (6,)]
    kept = derive(mean, a, x, keep=lambda leaf, d: d == 0)
    assert list(group_shapes(kept, a).values()) == [(3, 6)]
    verify(kept, mean, a, x, KEY)


def test_stacked_permutations_form_a_group():
    forward, a, x, _ = ensemble()
    spec = derive(forward, a, x)
    one, other = (permutation.random(spec, a, jax.random.key(i)) for i in range(2))
    in_turn = permutation.apply(spec, other, permutation.apply(spec, one, a))
    at_once = permutation.apply(spec, permutation.compose(one, other), a)
    back = permutation.apply(spec, permutation.invert(other), in_turn)
    for path, leaf in flatten(in_turn).items():
        np.testing.assert_array_equal(flatten(at_once)[path], leaf)
        expected = flatten(permutation.apply(spec, one, a))[path]
        np.testing.assert_array_equal(flatten(back)[path], expected)
    same = permutation.apply(spec, permutation.identity(spec, a), a)
    np.testing.assert_array_equal(same["in"], a["in"])


def test_products_and_concatenations_are_stacked_as_well():
    spec = PermutationSpec(
        {
            "w": (None, Stack("h"), permutation.Product("g", "h")),
            "c": (permutation.Concat(("h", 3), ("g", 2)), Stack("h")),
        },
        sizes={"h": 3},
    )
    leaves = {"w": normal(2, 4, 6), "c": normal(5, 4)}
    assert group_shapes(spec, leaves) == {"g": (2,), "h": (4, 3)}
    perms = permutation.random(spec, leaves, KEY)
    moved = permutation.apply(spec, perms, leaves)
    g = np.asarray(perms["g"])
    for layer, h in enumerate(np.asarray(perms["h"])):
        own = np.asarray(leaves["w"][:, layer]).reshape(2, 2, 3)[:, g][:, :, h]
        np.testing.assert_array_equal(moved["w"][:, layer], own.reshape(2, 6))
        column = np.asarray(leaves["c"][:, layer])
        expected = np.concatenate([column[:3][h], column[3:][g]])
        np.testing.assert_array_equal(moved["c"][:, layer], expected)


# Units that are permuted alike in all layers ==========================================

W = {"in": normal(4, 6), "w": normal(3, 6, 6), "u": normal(3, 6), "out": normal(6, 2)}


def carried(v, x):
    """The hidden units of one layer are added to those of the next."""

    def step(h, u):
        return jnp.tanh(h * u + 1), None

    return lax.scan(step, x @ v["in"], v["u"])[0] @ v["out"]


def summed(v, x):
    return jnp.tanh((x @ v["in"])[:, None] * v["u"]).sum(axis=1) @ v["out"]


def normed_over_layers(v, x):
    h = jax.nn.softmax((x @ v["in"])[:, None] * v["u"], axis=1)
    return jnp.einsum("blh,lh->b", h, v["u"])


def neighbours(v, x):
    return jnp.einsum("blh,lh->b", jnp.cumsum(x[:, :3, None] * v["u"], 1), v["u"])


def reversed_layers(v, x):
    return jnp.einsum("lh,lh->l", v["u"], v["u"][::-1]) * x.sum()


def mixed_by_a_graph(v, x):
    """A symmetric matrix mixes layers: both of its axes are the layers."""
    gram = v["w"][:, 0, :3] @ v["w"][:, 0, :3].T
    gram = gram + gram.T
    return jnp.einsum("lh,lh->l", jnp.tanh(gram @ v["u"]), v["u"]) * x.sum()


def picked_by_an_index(v, x):
    order = jnp.argsort(v["w"][:, 0, 0])
    return jnp.einsum("lh,lh->l", v["u"][order], v["u"]) * x.sum()


@pytest.mark.parametrize(
    "forward",
    [
        carried,
        summed,
        normed_over_layers,
        neighbours,
        reversed_layers,
        mixed_by_a_graph,
        picked_by_an_index,
    ],
)
def test_units_that_layers_share_have_one_permutation(forward):
    x = normal(5, 4)
    spec = derive(forward, W, x)
    shapes = group_shapes(spec, W)
    assert (6,) in shapes.values()
    assert spec.axes["u"][1] is not None
    verify(spec, forward, W, x, KEY)


# Specs by hand ========================================================================

LAYERS = {"in": normal(3, 4, 6), "b": normal(3, 6), "out": normal(3, 6, 2)}
BY_HAND = {
    "in": (Stack("h"), None, "h"),
    "b": (Stack("h"), "h"),
    "out": (Stack("h"), "h", None),
}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"b": (None, "h")}, r"'in' stacks.*'h' along axes of lengths \(3,\).*'b' alo"),
        ({"b": (Stack("h", "g"), "h")}, "'b' stacks layers of group 'g', but has no"),
        ({"b": (Stack("h"), Stack("h"))}, "'b' stacks layers of group 'h', but has"),
    ],
)
def test_a_spec_whose_stacks_do_not_fit_is_refused(axes, message):
    with pytest.raises(PermutationSpecError, match=message):
        validate(PermutationSpec(BY_HAND | axes), LAYERS)


def test_a_tap_shows_all_layers():
    spec = PermutationSpec(BY_HAND, taps={"t": "h"})
    with pytest.raises(PermutationSpecError, match="'t' must show each layer.*Stack"):
        validate(spec, LAYERS)
    validate(PermutationSpec(BY_HAND, taps={"t": (Stack("h"), None, "h")}), LAYERS)


def test_permutations_with_other_layers_are_refused():
    spec = PermutationSpec(BY_HAND)
    with pytest.raises(PermutationSpecError, match=r"'b'.*one row for each of \(3,\)"):
        permutation.apply(spec, {"h": np.arange(6)}, LAYERS)
    tied = PermutationSpec({leaf: (None, *axes[1:]) for leaf, axes in BY_HAND.items()})
    with pytest.raises(PermutationSpecError, match="it needs one axis"):
        permutation.apply(tied, {"h": np.tile(np.arange(6), (3, 1))}, LAYERS)


def test_layers_that_are_wrongly_declared_to_be_stacked_are_named():
    stacked = PermutationSpec(
        {"in": (None, "h"), "u": (Stack("g"), "g"), "out": ("h", None)}
        | {"w": (None, None, None)}
    )
    derived = derive(carried, W, normal(5, 4))
    (group,) = derived.groups
    tied = {
        leaf: tuple("h" if a == group else None for a in axes)
        for leaf, axes in derived.axes.items()
    }
    verify(PermutationSpec(tied), carried, W, normal(5, 4), KEY)
    with pytest.raises(PermutationSpecError, match="'u' axis"):
        verify(stacked, carried, W, normal(5, 4), KEY)


def test_layers_may_be_declared_to_be_permuted_alike():
    forward, a, x, _ = ensemble()
    axes = {"in": (None, None, "h"), "b": (None, "h"), "out": (None, "h", None)}
    verify(PermutationSpec(axes), forward, a, x, KEY)
