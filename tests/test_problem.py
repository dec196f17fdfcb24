"""LoRAProblem: what it refuses, what it computes, and that it is a pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.polynomial import monomials
from lora_limits.problem import project, projections, pull_back, reduced_form, scalars
from tests.support import reference
from tests.support.tools import quick_jit


def rebuilt(problem, **changes):
    """The problem through its constructor, some arguments replaced."""
    arguments = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)} | changes
    arrays = [arguments.pop(n) for n in ("x_query", "x_key", "x_value", "target")]
    return ll.LoRAProblem(*arrays, **arguments)


def refusals():
    """(what is wrong, changes, words of the message)."""
    p = problems.make(0, shape=problems.CROSS)
    a, w = p.adapters["query"], p.weights
    nan = p.x_key.copy()
    nan[0, 0] = np.nan
    yield "unknown name", {"adapters": {"output": a}}, r"adapters: got \['output'\]"
    yield "no adapter", {"adapters": {}}, "at least one of"
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), p)
    yield (
        "half precision",
        {n: getattr(half, n) for n in ("x_query", "x_key", "x_value", "target", "weights")},
        "x_query: got dtype bfloat16, expected float32 or float64",
    )
    yield "a string for a number", {"scale": "2"}, "scale: got '2', expected a finite number"
    yield "list for an array", {"x_query": [[1.0]]}, "x_query: got list, expected a 2-d array"
    yield "batch", {"target": p.target[None]}, r"target: got shape \(1, 11, 3\)"
    yield (
        "integers",
        {"x_value": np.ones((17, 4), int)},
        "x_value: got dtype int64, expected a floating dtype",
    )
    yield (
        "mixed dtypes",
        {"target": p.target.astype(np.float32)},
        "target: got dtype float32, expected float64",
    )
    yield "no tokens", {"x_query": p.x_query[:0], "target": p.target[:0]}, "no empty dimension"
    yield (
        "input width",
        {"x_query": p.x_query[:, :2]},
        r"weights.query: got shape \(3, 2\), expected \(2, ",
    )
    yield (
        "score width",
        {"weights": dataclasses.replace(w, key=w.key[:, :1])},
        "weights.key: got width 1, expected 2",
    )
    yield "tokens", {"x_value": p.x_value[:-1]}, "x_value: got 16 tokens, expected 17"
    yield "target", {"target": p.target[:-1]}, r"target: got shape \(10, 3\), expected \(11, 3\)"
    yield (
        "A",
        {"adapters": {"query": ll.Adapter(a.a[:, :1], a.b)}},
        r"\['query'\].a: got shape \(1, 1\), expected \(1, 2\)",
    )
    yield (
        "B",
        {"adapters": {"query": ll.Adapter(a.a, a.b[:2])}},
        r"\['query'\].b: got shape \(2, 1\), expected \(3, 1\)",
    )
    yield "rank 0", {"adapters": {"query": ll.Adapter(a.a[:0], a.b[:, :0])}}, "rank at least 1"
    yield "vector scale", {"scale": np.ones(2)}, r"scale: got shape \(2,\), expected a scalar"
    yield "NaN", {"x_key": nan}, "x_key: got NaN or infinite entries"
    yield "infinite scale", {"scale": float("inf")}, "scale: got inf, expected a finite number"
    yield "beta 0", {"beta": 0.0}, "beta: got 0.0, expected an inverse temperature above 0"
    yield "beta < 0", {"beta": -1.0}, "beta: got -1.0"


@pytest.mark.parametrize(
    ("changes", "message"), [pytest.param(c, m, id=name) for name, c, m in refusals()]
)
def test_what_is_wrong_is_refused_at_the_door(changes, message):
    with pytest.raises(ValueError, match=message):
        rebuilt(problems.make(0, shape=problems.CROSS), **changes)


def test_tracers_pass_the_door_and_shapes_are_checked_under_jit():
    p = problems.make(0, shape=problems.CROSS)
    with pytest.raises(ValueError, match="target: got shape"):
        jax.eval_shape(
            lambda x: rebuilt(p, x_query=x).target, jax.ShapeDtypeStruct((12, 3), np.float64)
        )
    out = jax.eval_shape(
        lambda x: projections(rebuilt(p, x_query=x)), jax.ShapeDtypeStruct((11, 3), np.float64)
    )
    assert [v.shape for v in out] == [(11, 2), (17, 2), (17, 3)]


def test_a_problem_is_a_pytree_with_every_number_a_leaf():
    p = problems.make(0, shape=problems.CROSS)
    leaves, tree = jax.tree.flatten(p)
    assert len(leaves) == 4 + 3 + 2 * 3 + 2
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, ll.LoRAProblem)
    assert all(x is y for x, y in zip(jax.tree.leaves(again), leaves, strict=True))
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(p)}
    assert {".weights.key", ".adapters['value'].b", ".beta"} <= paths


@pytest.mark.parametrize("adapt", problems.SUBSETS, ids="+".join)
def test_reduced_form_has_the_same_scores(adapt):
    p = problems.make(1, shape=problems.CROSS, adapt=adapt)
    r = quick_jit(reduced_form)(p)
    np.testing.assert_allclose(
        r["C1"] @ r["Wbar"] @ r["C2"].T, reference.scores(p), rtol=1e-12, atol=1e-13
    )
    np.testing.assert_array_equal(r["C3"], projections(p)[2])


@pytest.mark.parametrize("name", problems.FULL)
def test_pull_back_is_the_transpose_of_project(name):
    p = problems.make(2, shape=problems.CROSS)
    x = jnp.asarray(getattr(p, f"x_{name}"))

    def with_adapter(adapter):
        leaves = {**p.adapters, name: adapter}
        return project(rebuilt(p, adapters=leaves), name, x)

    out, back = jax.vjp(with_adapter, jax.tree.map(jnp.asarray, p.adapters[name]))
    rows = np.random.default_rng(0).normal(size=out.shape)
    got, (want,) = pull_back(p, name, jnp.asarray(rows)), back(jnp.asarray(rows))
    np.testing.assert_allclose(got.a, want.a, rtol=1e-12)
    np.testing.assert_allclose(got.b, want.b, rtol=1e-12)


def test_the_update_itself_is_never_formed():
    """B A would be (d_model, d) = (64, 48); with r = 1 nothing of that size appears."""
    shape = problems.Shape(lq=3, lk=3, inputs=(64, 64, 64), width=48, value_width=48, rank=1)
    p = problems.make(0, shape=shape)
    rows = jnp.ones((3, 48))
    jaxpr = jax.make_jaxpr(
        lambda p: (projections(p), [pull_back(p, n, rows) for n in problems.FULL])
    )(p)
    assert max(v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars) < 64 * 48


def test_dtype_follows_the_inputs():
    for dtype in (np.float32, np.float64):
        p = problems.make(0, dtype=dtype)
        assert p.dtype == dtype
        assert {v.dtype for v in scalars(p)} == {np.dtype(dtype)}
        assert {v.dtype for v in projections(p)} == {np.dtype(dtype)}


def test_a_problem_passes_through_jit_unchanged():
    p = problems.make(3)
    out = quick_jit(lambda p: p)(p)
    assert isinstance(out, ll.LoRAProblem)
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(p), strict=True):
        np.testing.assert_array_equal(x, y)


def test_numbers_of_other_libraries_are_numbers():
    p = problems.make(4)
    for scale in (2, np.int64(2), np.float32(2.0), jnp.float32(2.0)):
        assert float(scalars(rebuilt(p, scale=scale))[0]) == 2.0


def test_double_precision_of_numpy_is_what_jax_makes_of_it():
    """With x64 off JAX holds single precision: arrays of both libraries then fit together."""
    p = problems.make(5)
    with jax.enable_x64(False):
        mixed = rebuilt(
            p, target=jnp.asarray(p.target), adapters=jax.tree.map(jnp.asarray, p.adapters)
        )
        assert mixed.dtype == np.float32
        # The other not step by step, which would compile each of its hundreds of steps.
        for solve in (ll.gradient, quick_jit(ll.gradient)):
            method = ll.Exact() if solve is ll.gradient else ll.Polynomial(1)
            gradient = jax.tree.leaves(solve(mixed, method).gradient)
            assert {x.dtype for x in gradient} == {np.dtype(np.float32)}


def test_a_method_is_static_without_being_named_so():
    """jit compiles once for each, as for a static argument, and methods pass through pytrees."""
    p = problems.make(6)
    run = quick_jit(lambda p, method: ll.gradient(p, method))
    width = p.weights.query.shape[1]
    for degree in (0, np.int64(1), jnp.int32(1)):
        assert run(p, ll.Polynomial(degree)).rank == monomials.count(width, int(degree))
    assert run._cache_size() == 2
    assert jax.tree.leaves([ll.Exact(), ll.Skeleton(2)]) == []


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2.0), "2", None, np.ones(2)])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(ValueError, match=r"Polynomial degree: got .*, expected an integer"):
        ll.Polynomial(value)


def test_rows_must_be_known_while_tracing():
    p = problems.make(7)
    solve = jax.jit(lambda p, n: ll.gradient(p, ll.Polynomial(1), rows=n, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"rows: got .*, expected an integer of at least 2"):
        solve(p, 4)


@pytest.mark.parametrize("tolerance", [True, "1", float("nan"), 0, -1.0, np.inf])
def test_a_tolerance_is_a_number_above_zero(tolerance):
    with pytest.raises(ValueError, match=r"tolerance: got .*, expected a number above 0"):
        ll.choose(problems.make(8), tolerance)
