"""BlockTree: exact where everything is near, right on average where it samples, the share of every
row in its error, what it says of itself, and what it costs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from experiments.problems import minilm
from lora_limits.coordinates import frame as frames
from lora_limits.factors.block_tree import method as methods
from lora_limits.factors.block_tree import passes, rows, trees
from lora_limits.factors.block_tree.layout import arrange
from lora_limits.factors.method import coordinates
from lora_limits.instruments.counting import count_operations
from lora_limits.problem import projections
from tests.support import reference
from tests.support.compiled import GRADIENT
from tests.support.tools import arrays, assert_close, later, quick_jit

FEW = ll.BlockTree(32, 16)  # most keys are far, at the lengths of these tests


@functools.cache
def head(length=300, keys=None):
    """A soft head, in double precision; it may have fewer keys than queries."""
    p = minilm.problem(5, 4, length=length, noise=1.0, dtype="float64")
    return dataclasses.replace(p, x_key=p.x_key[:keys], x_value=p.x_value[:keys])


def exact(p):
    return {n: np.asarray(x) for n, x in arrays(GRADIENT(p, ll.Exact()).gradient).items()}


def relative(got, want):
    """Relative Frobenius errors of all arrays."""
    got = arrays(got)
    return {n: np.linalg.norm(got[n] - x) / np.linalg.norm(x) for n, x in want.items()}


@pytest.mark.parametrize(("n", "levels"), [(1, 0), (33, 2), (100, 4), *later((5, 1))])
def test_a_tree_holds_every_point_once_and_puts_like_ones_together(n, levels):
    points = np.random.default_rng(n).normal(size=(n, 3))
    order = np.asarray(trees.halving(jnp.asarray(points), levels, -(-n // 2**levels)))
    assert sorted(order[order < n]) == list(range(n))
    if levels == 4:
        within = np.mean([points[leaf[leaf < n]].var(0).sum() for leaf in order])
        assert within < 0.5 * points.var(0).sum()


@pytest.mark.parametrize("shape", ["cross", *later("smallest", "one key", "one query")])
def test_a_tree_whose_keys_are_all_near_gives_the_exact_gradient(shape):
    p = problems.make(3, shape=problems.SHAPES[shape])
    result = GRADIENT(p, ll.BlockTree())
    loss, want = reference.loss_and_gradient(p)
    assert_close(result.gradient, {n: ll.Adapter(*ab) for n, ab in want.items()}, 1e-9)
    assert float(result.loss) == pytest.approx(loss)
    assert not bool(result.failed)


@pytest.mark.parametrize(
    ("length", "keys", "adapt"), [(300, None, None), *later((301, 200, ("key",)), (97, 300, None))]
)
def test_a_head_is_approximated_at_any_length(length, keys, adapt):
    p = head(max(length, keys or 0), keys)
    p = dataclasses.replace(p, x_query=p.x_query[:length], target=p.target[:length])
    if adapt:
        p = dataclasses.replace(p, adapters={n: p.adapters[n] for n in adapt})
    result = GRADIENT(p, FEW)
    errors = relative(result.gradient, exact(p))
    assert max(errors.values()) < 0.3
    assert max(errors.values()) > 1e-4  # far keys there are
    assert not bool(result.failed)


def soft(width, value_width, seed=0, tokens=260, keys=230):
    """A soft head of any widths, whose tokens lie in clusters."""
    rng = np.random.default_rng((seed, width))
    inputs = 6
    x = rng.normal(size=(12, inputs))[rng.integers(12, size=tokens + keys)]
    x = x + 0.3 * rng.normal(size=x.shape)
    q, k, v = (rng.normal(size=(inputs, n)) for n in (width, width, value_width))
    adapters = {
        name: ll.Adapter(rng.normal(size=(2, n)), 0.1 * rng.normal(size=(inputs, 2)))
        for name, n in (("query", width), ("key", width), ("value", value_width))
    }
    return ll.LoRAProblem(
        x[:tokens],
        x[tokens:],
        x[tokens:],
        rng.normal(size=(tokens, value_width)),
        weights=ll.AttentionWeights(q, k, v),
        adapters=adapters,
        scale=1.0,
        beta=0.3 / width,
    )


@pytest.mark.parametrize("widths", [(16, 9), *later(((128, 16),), ((64, 64),), ((16, 128),))])
def test_heads_of_any_width_are_approximated(widths):
    """Values of a width of their own, fewer keys than queries."""
    p = soft(*widths)
    result = GRADIENT(p, FEW)
    errors = relative(result.gradient, exact(p))
    assert 1e-6 < max(errors.values()) < 0.2
    assert not bool(result.failed)


def test_vmap_over_heads_is_one_after_the_other():
    """Draws too: they come from each head's own queries."""
    heads = [soft(16, 9), soft(16, 9, seed=1)]
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(z) for z in x]), *heads)
    many = quick_jit(jax.vmap(lambda p: ll.gradient(p, FEW).gradient))(stacked)
    for i, p in enumerate(heads):
        one = GRADIENT(p, FEW).gradient
        assert_close(jax.tree.map(lambda x, i=i: x[i], many), one, 1e-9)


@quick_jit
def inside(p, key):
    """(rows of both kinds, which keys are near, found, the same with all rows repaired, terms)."""
    q, k, v = projections(p)
    layout = arrange(*coordinates(p, frames.of_problem(p)), FEW.near)
    found = passes.through(layout, v, p.target, q, k, key, FEW.samples)
    index = jnp.arange(q.shape[0], dtype=jnp.int32)
    both = rows.written_out(layout, found, v, p.target, index)
    near = ~jnp.repeat(layout.far, layout.key.shape[1], axis=1)
    near = near[rows._places(layout, q.shape[0]) // layout.query[0].size]
    whole = rows.repaired(layout, found, both, index, q, k)
    return both, near, found, whole, rows.terms(p, layout, both, index, q, k)


def test_remainders_are_unbiased_and_average_out_over_keys():
    """D~ / D of every row is f / f~ at any near key; its mean over draws is 1."""
    p = head()
    ratios = []
    outs = []
    for n in range(48):
        both, near, found, *_ = inside(p, jax.random.key(n))
        f = np.asarray(both.f)
        best = np.where(near, f, 0).argmax(1)[:, None]
        tree = f - np.asarray(both.less_f)
        ratios.append((np.take_along_axis(f, best, 1) / np.take_along_axis(tree, best, 1))[:, 0])
        outs.append(np.asarray(found.out))
    off = np.mean(ratios, 0) - 1
    spread = np.std(ratios, 0)
    assert spread.min() > 0
    assert np.mean(np.abs(off) < 3.5 * spread / 48**0.5) > 0.98
    # and so do outputs, whose quotients are biased a little
    true = outs[0] + np.asarray(both.less_c) + (outs[-1] - outs[0])
    each = np.mean([np.linalg.norm(out - true) for out in outs])
    assert np.linalg.norm(np.mean(outs, 0) - true) < 0.3 * each


def test_rows_written_out_are_the_rows_that_were_used():
    """Their differences from exact rows, added to what the tree made, give the exact gradient."""
    p = head()
    _, _, found, whole, terms = inside(p, jax.random.key(0))
    q, k, v = (np.asarray(x) for x in projections(p))
    s = np.asarray(p.beta * q @ k.T)
    f = np.exp(s - s.max(1, keepdims=True))
    f /= f.sum(1, keepdims=True)
    out = f @ v
    c = out - np.asarray(p.target)
    kernel = f * (c @ v.T - (c * out).sum(1, keepdims=True))
    wants = {"out": out, "queries": kernel @ k, "keys": kernel.T @ q, "values": f.T @ c}
    for name, want in wants.items():
        np.testing.assert_allclose(getattr(whole, name), want, atol=1e-9 * np.abs(want).max())
        assert np.linalg.norm(getattr(found, name) - want) > 1e-3 * np.linalg.norm(want)
    # and the terms of all rows add up to the error of each array
    error = np.einsum("tmi,tmj->ij", *terms["key"].b)
    less = kernel.T @ q - np.asarray(found.keys)
    a = np.asarray(p.adapters["key"].a)
    want = p.scale * p.beta * (np.asarray(p.x_key).T @ less) @ a.T
    np.testing.assert_allclose(error, want, atol=1e-8 * np.abs(want).max())


def test_without_a_key_other_queries_draw_other_keys():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    keys = [FEW.key(z) for z in (q, q, 1.001 * q)]
    same, first, second = (jax.random.key_data(z) for z in keys)
    assert (same == first).all()
    assert (same != second).any()


def test_what_it_says_of_its_error_is_near_the_error():
    ratios = []
    for layer, number in minilm.heads()[::3]:
        p = minilm.problem(layer, number, length=300, noise=1.0, dtype="float64")
        result = GRADIENT(p, FEW)
        errors = relative(result.gradient, exact(p))
        said = {n: float(x) for n, x in arrays(result.relative_error).items()}
        ratios.append(max(said.values()) / max(errors.values()))
        if max(errors.values()) > 1:
            assert bool(result.failed)
        if max(errors.values()) < 0.2:
            assert not bool(result.failed)
    assert 0.5 < np.median(ratios) < 3
    assert min(ratios) > 0.25


def shapes(length):
    """A problem of a real head's shapes, nothing in it."""
    p = minilm.problem(5, 4, length=16)

    def longer(x):
        return jax.ShapeDtypeStruct((length, *x.shape[1:]), x.dtype) if x.shape[:1] == (16,) else x

    return jax.tree.map(lambda x: longer(x) if hasattr(x, "shape") else x, p)


def test_operations_and_memory_are_those_promised():
    """A token costs little more as the sequence grows; no array grows with the square of it."""

    def count(length, method):
        return count_operations(lambda p: ll.gradient(p, method).gradient, shapes(length))

    few, many = (count(n, ll.BlockTree()) for n in (8192, 32768))
    assert many["flops"] < 1.6 * 4 * few["flops"]
    assert many["largest"] <= max(4 * few["largest"], 32768 * 400)
    assert few["flops"] < 0.7 * count(8192, ll.Exact(1024))["flops"]
    assert many["flops"] < 0.2 * count(32768, ll.Exact(1024))["flops"]


@pytest.mark.slow
def test_heads_kept_aside_are_reached_at_2048_tokens():
    errors = []
    for layer, number in minilm.heads(minilm.ASIDE):
        p = minilm.problem(layer, number, length=2048, noise=1.0, path=minilm.ASIDE)
        result = GRADIENT(p, ll.BlockTree())
        assert not bool(result.failed)
        errors.append(max(relative(result.gradient, exact(p)).values()))
    assert len(errors) == 6
    assert np.median(errors) < 0.05
    assert max(errors) < 0.1


@pytest.mark.slow
def test_training_ends_near_where_exact_training_ends():
    """A hundred steps of Adam on one head; draws differ from step to step by themselves."""
    p = head()
    optimiser = optax.adam(optax.cosine_decay_schedule(1e-2, 100))

    @functools.partial(quick_jit, static_argnums=0)
    def trained(method):
        def step(carry, _):
            adapters, state = carry
            found = ll.gradient(dataclasses.replace(p, adapters=adapters), method)
            updates, state = optimiser.update(found.gradient, state)
            return (optax.apply_updates(adapters, updates), state), None

        start = jax.tree.map(jnp.asarray, p.adapters)
        return jax.lax.scan(step, (start, optimiser.init(start)), length=100)[0][0]

    # optax counts steps in integers
    with jax.numpy_dtype_promotion("standard"):
        adapters = [trained(method) for method in (ll.Exact(), ll.BlockTree(64, 64))]
    ends = [float(ll.loss(dataclasses.replace(p, adapters=z))) for z in adapters]
    before = float(ll.loss(p))
    assert ends[0] < 0.97 * before
    assert abs(ends[1] - ends[0]) < 0.05 * (before - ends[0])


def test_rows_that_are_not_believed_are_counted():
    moved = jnp.asarray([[[0.5, jnp.inf, 0.1, jnp.inf]]]).reshape(1, 4)
    layout = type("Layout", (), {"query": jnp.arange(4, dtype=jnp.int32).reshape(1, 1, 4)})
    found = type("Found", (), {"forward": type("F", (), {"moved": moved}), "out": jnp.ones((4, 2))})
    doubt, lost = methods._doubt(layout, found, jnp.zeros((4, 2)))
    assert int(lost) == 2
    assert np.isinf(np.asarray(doubt)).tolist() == [False, True, False, True]
