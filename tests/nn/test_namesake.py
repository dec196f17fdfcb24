"""Attention beside its namesake, jax.nn.dot_product_attention, and inside Flax's modules."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_limits as ll
from tests.support.tools import later, quick_jit

B, T, S, N, H = 2, 10, 12, 4, 8
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-2, "float16": 3e-3}
MASKS = {
    "none": lambda: {},
    "causal": lambda: {"is_causal": True},
    "keys": lambda: {
        "mask": np.arange(S)[None, None, None] < np.array([S, 7])[:, None, None, None]
    },
    "lengths": lambda: {
        "query_seq_lengths": np.array([T, 6], np.int32),
        "key_value_seq_lengths": np.array([5, S], np.int32),
    },
    "window": lambda: {"local_window_size": (3, 2)},
    "all": lambda: {
        "is_causal": True,
        "mask": np.arange(S)[None, None, None] > 0,
        "query_seq_lengths": np.array([7, 9], np.int32),
        "local_window_size": 4,
    },
}


def inputs(dtype="float32", key_heads=N, queries=T, keys=S, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((queries, N), (keys, key_heads), (keys, key_heads), (queries, N))
    return [jnp.asarray(rng.normal(size=(B, *shape, H)), dtype) for shape in shapes]


def namesake(q, k, v, **options):
    """jax.nn's, 0 for the queries that see no key, of which it makes the mean of all values."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = jax.nn.dot_product_attention(q, k, v, **options)
        # Values of 1 less those of 0 would not tell: a mean of ones is 1. Seen or not is counted.
        return jnp.where(sees(q, k, **options), out, 0)


def sees(q, k, is_causal=False, mask=None, local_window_size=None, **lengths):
    i, j = np.ogrid[: q.shape[1], : k.shape[1]]
    seen = np.broadcast_to(not is_causal, (q.shape[0], q.shape[1], k.shape[1])) | (j <= i)[None]
    if mask is not None:
        seen = seen & mask[:, 0]
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        seen = seen & (j >= i - left) & (j <= i + right)
    for name, position in (("query_seq_lengths", i), ("key_value_seq_lengths", j)):
        if name in lengths:
            seen = seen & (position[None] < lengths[name][:, None, None])
    return seen.any(2)[:, :, None, None]


def value_and_gradients(function, arrays, **options):
    def run(q, k, v, t):
        out, back = jax.vjp(lambda *x: function(*x, **options), q, k, v)
        return out, *back(t)

    return quick_jit(run)(*arrays)


def assert_near(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        x, y = np.asarray(x, float), np.asarray(y, float)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


GRID = [
    ("float32", N, "none"),
    ("float32", 2, "causal"),
    ("bfloat16", 2, "keys"),
    ("float16", 1, "all"),
    ("float32", 2, "all"),
    ("float32", 1, "lengths"),
    ("float32", 2, "window"),
]
REST = [x for x in itertools.product(TOLERANCE, (N, 2, 1), MASKS) if x not in GRID]


@pytest.mark.parametrize(("dtype", "key_heads", "masks"), [*GRID, *later(*REST)])
def test_every_case_of_the_namesake(dtype, key_heads, masks):
    """dtypes x grouped heads x masks, forward and gradient, beside the namesake's in float32."""
    arrays = inputs(dtype, key_heads)
    options = MASKS[masks]()
    wide = [x.astype("float32") for x in arrays]
    want = [x.astype(dtype) for x in value_and_gradients(namesake, wide, **options)]
    for method in (ll.Exact(), ll.Exact(4), ll.Polynomial(2)):
        got = value_and_gradients(functools.partial(ll.attention, method=method), arrays, **options)
        assert_near(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("method", [ll.Exact(), ll.Polynomial(2, block_size=4)], ids=str)
def test_vmap_in_any_axis(axis, method):
    arrays = [inputs(seed=seed)[:3] for seed in (1, 2)]
    stacked = [np.stack(x, axis) for x in zip(*arrays, strict=True)]
    call = functools.partial(ll.attention, method=method, is_causal=True)
    got = quick_jit(jax.vmap(call, in_axes=axis, out_axes=axis))(*stacked)
    want = np.stack([quick_jit(call)(*x) for x in arrays], axis)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [ll.Exact(), ll.Polynomial(3, block_size=4)], ids=str)
def test_one_sequence_needs_no_batch_axis(method):
    q, k, v, _ = (x[0] for x in inputs())
    mask = np.arange(S) < 8
    run = quick_jit(functools.partial(ll.attention, method=method))
    want = run(q[None], k[None], v[None], mask=mask[None])[0]
    for layout in (mask, mask[None], mask[None, None], mask[None, None, None]):
        got = run(q, k, v, mask=layout)
        assert got.shape == q.shape
        np.testing.assert_array_equal(got, want)


def test_a_mask_of_keys_has_many_layouts():
    q, k, v, _ = inputs()
    mask = np.arange(S) < np.array([S, 7])[:, None]
    run = quick_jit(functools.partial(ll.attention, method=ll.Exact()))
    np.testing.assert_array_equal(run(q, k, v, mask=mask[:, None, None]), run(q, k, v, mask=mask))
    shared = run(q, k, v, mask=np.stack([mask[1]] * 2))
    for layout in (mask[1], mask[1:], mask[1:, None], mask[1:, None, None]):
        np.testing.assert_array_equal(run(q, k, v, mask=layout), shared)


@pytest.mark.parametrize(
    "method",
    [ll.Polynomial(2, block_size=4), *later(ll.Exact(4), ll.Skeleton(3), ll.SparseLowRank(4, 4))],
    ids=str,
)
@pytest.mark.parametrize("window", [(4, 2), *later(((0, 1),), ((150, 3),), ((500, 500),))])
def test_a_window_is_exact_whatever_the_method(method, window):
    """Longer than a block of the band, queries and keys of other lengths, with keys masked."""
    q, k, v, t = inputs(key_heads=2, queries=300, keys=290)
    options = {"local_window_size": window, "mask": np.arange(290)[None, None, None] % 7 > 0}
    call = functools.partial(ll.attention, method=method)
    got = value_and_gradients(call, (q, k, v, t), **options)
    assert_near(got, value_and_gradients(namesake, (q, k, v, t), **options), 5e-6)


def test_a_window_costs_no_array_of_all_pairs():
    length = 2**14
    x = jax.ShapeDtypeStruct((1, length, 1, 4), np.float32)
    call = functools.partial(ll.attention, method=ll.Polynomial(2), local_window_size=(100, 0))
    memory = quick_jit(call).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * length


REFUSED = {
    "pairs": ({"mask": np.ones((B, N, T, S), bool)}, r"mask: got bool of shape .*is_causal"),
    "pairs of all": ({"mask": np.ones((1, 1, T, S), bool)}, "mask of keys, .batch, keys."),
    "heads": ({"mask": np.ones((B, N, 1, S), bool)}, "mask of keys"),
    "two": ({"mask": np.ones((T, S), bool)}, r"mask: got bool of shape \(10, 12\)"),
    "bias": ({"bias": np.ones((1, 1, T, S))}, "bias: got one, expected none"),
    "residual": ({"return_residual": True}, "return_residual: got True"),
    "query mask": ({"query_mask": np.ones((B, S), bool)}, r"query_mask: got bool of shape \(2, 12"),
    "lengths": ({"query_seq_lengths": np.ones(3, int)}, "query_seq_lengths: got int64 of shape"),
    "real lengths": ({"key_value_seq_lengths": np.ones(B)}, "key_value_seq_lengths: got float64"),
    "window": ({"local_window_size": -1}, "local_window_size: got -1, expected an integer"),
    "window of 3": ({"local_window_size": (1, 2, 3)}, r"local_window_size: got \(1, 2, 3\)"),
    "keys alone": ({"key_value_segment_ids": np.ones((B, S), int)}, "query_segment_ids: got None"),
    "one packing": ({"query_segment_ids": np.ones((B, T), int)}, "key_value_segment_ids: got None"),
    "segments": ({"query_segment_ids": np.ones((B, S), int)}, "query_segment_ids: got int64"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_factored_form_is_refused_by_name(options, message):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=message):
        ll.attention(q, k, v, method=ll.Polynomial(2), **options)


class Model(nnx.Module):
    """Flax's own attention, by a method."""

    def __init__(self, attention_fn, **options):
        self.attention = nnx.MultiHeadAttention(
            4, 8, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0), **options
        )

    def __call__(self, x, **options):
        return self.attention(x, **options)


@pytest.mark.parametrize(
    "options", [{"num_kv_heads": 2}, *later({}, {"dtype": jnp.bfloat16})], ids=str
)
def test_the_attention_of_flax_trains_one_step(options):
    """The same loss, gradients and step as with Flax's own function."""
    x = jnp.asarray(0.4 * np.random.default_rng(0).normal(size=(3, 2, 20, 8)), jnp.float32)
    mask = np.ones((3, 2, 1, 1, 20), bool)
    mask[:, 1, :, :, 13:] = False

    @functools.partial(jax.jit, static_argnums=0)
    def step(attention_fn):
        model = Model(attention_fn, **options)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        def loss(model):
            return (model(x, mask=mask)[:, :, :13].astype(jnp.float32) ** 2).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value, nnx.state(model, nnx.Param)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want = jax.tree.leaves(step(nnx.dot_product_attention))
        got = jax.tree.leaves(step(ll.AttentionFn(ll.Exact())))
        near = jax.tree.leaves(step(ll.AttentionFn(ll.Polynomial(4, block_size=8))))
    tolerance = 2e-2 if options.get("dtype") == jnp.bfloat16 else 1e-5
    for x, y, z in zip(got, want, near, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(z, y, rtol=1e-2, atol=1e-2)


def test_a_module_compiles_once_for_equal_methods():
    run = nnx.jit(lambda model, x: model(x, is_causal=True))
    x = jnp.ones((1, 6, 8), jnp.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(2):
            run(Model(ll.AttentionFn(ll.Polynomial(2))), x)
    assert run.jitted_fn._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_rate": 0.5}, "dropout_rate: got 0.5"),
        ({"module": object()}, "sow_weights: got True"),
        ({"bias": np.zeros((1, 1, T, S))}, "bias: got one"),
    ],
)
def test_what_flax_may_ask_for_and_there_is_not_is_refused(options, message):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=message):
        ll.AttentionFn(ll.Exact())(q, k, v, **options)
