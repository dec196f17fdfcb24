"""The polynomial gradient of causal, rotary, padded and packed problems: against the derivative of
the factored forward written out, the exact gradient, and what it may cost.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.instruments.counting import count_operations
from lora_limits.problem import replaced
from lora_limits.rotary import Rotations
from tests.support import masked_reference
from tests.support.masked_problems import (
    L,
    abstract,
    assert_untouched,
    combinations,
    filled,
    having,
)
from tests.support.tools import arrays, assert_close, later, quick_jit

PROMISED = quick_jit(ll.gradient, static_argnums=1)
# what is not asked for is not compiled
GRADIENT = quick_jit(
    lambda p, method: dataclasses.replace(ll.gradient(p, method), bound=None), static_argnums=1
)
BLOCK = 4


def polynomial(degree, **options):
    return ll.Polynomial(degree, block_size=BLOCK, **options)


def rows(problem, adapters):
    """Q and K with sqrt(beta) in, and V."""
    out = []
    for name in problems.FULL:
        w = jnp.asarray(getattr(problem.weights, name))
        w = w + problem.scale * adapters[name].b @ adapters[name].a
        z = getattr(problem, f"x_{name}") @ w
        if problem.rotations is not None and name != "value":
            z = masked_reference.turned(z, jnp.asarray(getattr(problem.rotations, name)))
        out.append(z * (problem.beta**0.5 if name != "value" else 1.0))
    return out


def factored_loss(problem, adapters, degree, centred):
    """The forward whose derivative the gradient is: e^s within a causal block, P(s) beyond it."""
    hold = jax.tree.map(jnp.asarray, dict(problem.adapters))
    q, k, v = rows(problem, adapters)
    n = len(problem.x_query)
    asked = np.ones(n) if problem.query_mask is None else problem.query_mask * 1.0
    exists = np.ones(n, bool) if problem.key_mask is None else problem.key_mask
    nu = asked @ rows(problem, hold)[0] / asked.sum() * float(centred)
    # constant shares of keys that move; where nothing is centred mu is 0, and moves all the same
    log_w = jnp.where(exists, rows(problem, hold)[1] @ nu, -jnp.inf)
    mu = jax.nn.softmax(log_w) @ (k - rows(problem, hold)[1] * (1 - float(centred)))
    s = (q - nu[None]) @ (k - mu[None]).T
    p = sum(s**m / math.factorial(m) for m in range(degree + 1))
    if problem.causal or problem.segments is not None:
        block = np.arange(n) // BLOCK
        p = jnp.where(block[:, None] == block[None], jnp.exp(s), p)
    seen = masked_reference.who_sees_whom(problem)
    p = jnp.where(seen, p * jnp.exp((k - mu[None]) @ nu)[None], 0)
    total = p.sum(1, keepdims=True)
    out = p @ v / jnp.where(seen.any(1)[:, None], total, 1)
    return 0.5 * ((out - problem.target) ** 2 * asked[:, None]).sum()


CASES = [
    (("causal", "rotations", "key_mask", "query_mask", "segments"), 2, True),
    (("partial rotations", "key_mask"), 3, True),
    *later(
        (("causal",), 4, True),
        (("causal", "rotations"), 2, False),
        (("rotations",), 3, False),
        (("query_mask", "key_mask"), 2, True),
        (("causal", "segments"), 4, True),
        (("segments", "key_mask"), 2, True),
    ),
]


@pytest.mark.parametrize(("names", "degree", "centred"), CASES)
def test_it_is_the_derivative_of_the_factored_forward(names, degree, centred):
    p = having(*names, reach=1.5)

    def run(adapters):
        return factored_loss(p, adapters, degree, centred)

    loss, want = quick_jit(jax.value_and_grad(run))(jax.tree.map(jnp.asarray, dict(p.adapters)))
    got = PROMISED(p, polynomial(degree, centred=centred))
    np.testing.assert_allclose(got.loss, loss, rtol=1e-12)
    assert_close(got.gradient, want, 1e-11)
    assert got.rank == math.comb(4 + degree, degree)
    assert 0 < float(got.normaliser) < np.inf
    true = arrays(masked_reference.loss_and_gradient(p)[1])
    bounds = arrays(got.bound)
    for name, x in arrays(got.gradient).items():
        assert np.abs(x - true[name]).max() <= bounds[name] < np.inf, name


def test_with_masks_of_ones_and_angles_of_zero_it_is_the_plain_gradient():
    p = having(reach=1.5)
    plain = GRADIENT(p, polynomial(3))
    got = GRADIENT(dataclasses.replace(filled(p), segments=None), polynomial(3))
    np.testing.assert_allclose(got.loss, plain.loss, rtol=1e-13)
    assert_close(got.gradient, plain.gradient, 1e-12)


@pytest.mark.parametrize("order", [(), ("causal",)], ids="+".join)
def test_every_combination_nears_the_exact_gradient(order):
    """R is about 1: degree 8 leaves less than 1e-6."""
    many = [c for c in combinations() if set(order) == set(c) & {"causal", "window"}]
    many = [c for c in many if "partial rotations" not in c]
    given = [having(*c, reach=0.7) for c in many]
    whole = [filled(p) for p in given]
    batch = quick_jit(jax.vmap(lambda p: ll.gradient(p, polynomial(8)).gradient))(
        problems.stack(whole)
    )
    assert len(given) == 16
    for i, p in enumerate(given):
        want = masked_reference.loss_and_gradient(p)[1]
        assert_close(jax.tree.map(lambda x, i=i: x[i], batch), want, 1e-6)


@pytest.mark.parametrize("names", [("causal", "rotations"), *later((("causal", "segments"),))])
def test_what_comes_after_the_queries_that_count_changes_no_bit(names):
    p = having(*names, reach=1.0)
    late = np.arange(L) >= 7
    p = dataclasses.replace(p, query_mask=~late)
    assert_untouched(lambda p: GRADIENT(p, polynomial(2)).gradient, p, late, late)


def test_padding_changes_no_bit():
    p = having("query_mask", "key_mask", reach=1.0)
    run = lambda p: GRADIENT(p, polynomial(2)).gradient  # noqa: E731
    assert_untouched(run, p, ~p.query_mask, ~p.key_mask)


def of_width_one(queries, keys, adapted=0.0, **fields):
    """A problem whose scores are the products of these numbers; value inputs and target drawn."""
    one, rng = np.ones((1, 1)), np.random.default_rng(0)
    value, target = rng.normal(size=(2, len(keys), 1))
    return ll.LoRAProblem(
        queries[:, None],
        keys[:, None],
        value,
        target,
        weights=ll.AttentionWeights(one, one, one),
        adapters={name: ll.Adapter(adapted * one, one) for name in problems.FULL},
        scale=1.0,
        beta=1.0,
        **fields,
    )


def test_no_key_is_lost_where_its_weight_would_underflow():
    """Every key scores 114 above the one before: seen from the last, the first is exp(-800), and yet
    all that the first query has. (The queries between are beyond any polynomial.)
    """
    ends = np.array([True] + [False] * 6 + [True])
    p = of_width_one(np.full(8, 5.7), 20.0 * np.arange(8), causal=True, query_mask=ends)
    got = GRADIENT(p, ll.Polynomial(2, block_size=1))
    loss, want = masked_reference.loss_and_gradient(p)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(got.gradient["value"].a, want["value"].a, rtol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_document_within_its_block_is_exact_however_low_its_scores(causal):
    """exp of every score of the first document is more than there is, and of the second 0, which
    padding makes no longer than its block.
    """
    rng, there = np.random.default_rng(1), np.arange(12) < 8
    queries = np.where(np.arange(12) < 4, 40.0, -40.0) + rng.normal(size=12) / 80
    p = of_width_one(
        queries,
        20.0 + rng.normal(size=12) / 80,
        adapted=0.1,
        causal=causal,
        segments=np.repeat([0, 1], [4, 8]),
        key_mask=there,
        query_mask=there,
    )
    got = GRADIENT(p, ll.Polynomial(2, centred=False, block_size=8))
    loss, want = masked_reference.loss_and_gradient(p)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-10)
    assert_close(got.gradient, want, 1e-9)


# ----------------------------------------------------------------------------------------------- the cost

LONG = 2**14


def counted(method, **fields):
    angles = jax.ShapeDtypeStruct((LONG, 4), np.float64)
    if fields.pop("rotary", False):
        fields["rotations"] = Rotations(angles, angles)
    p = abstract(LONG, **fields)
    return count_operations(lambda p: ll.gradient(p, method).gradient, p)


@pytest.mark.parametrize("fields", [{"causal": True}, {"rotary": True, "causal": True}])
def test_operations_and_memory_of_long_causal_problems(fields):
    """At L = 2^14, d = 8: what prefix sums and the blocks' own scores cost, and no more; no array
    larger than the tokens or a block of features.
    """
    degree, block, d = 2, 256, 8
    found = counted(ll.Polynomial(degree, block_size=block), **fields)
    k, columns = math.comb(d + degree, degree), 1 + d
    # M twice and T once, [D, D out] once, and slopes of queries and keys (k (d + 1) columns at most)
    far = 2 * LONG * k * columns * (3 + 1 + 2 * 2)
    near = 2 * LONG * block * (2 * d + 2 * columns + 2 * columns + 2 * d + d)
    small = 2 * LONG * 16 * 8 * 12
    assert near < found["flops"] < far + near + small
    assert found["largest"] <= max(LONG * 16, LONG * columns * 2, block * block, k * block)


def test_a_rotation_adds_no_product_and_a_mask_no_more():
    plain = counted(ll.Polynomial(2), key_mask=jax.ShapeDtypeStruct((LONG,), np.bool_))["flops"]
    rotary = counted(ll.Polynomial(2), rotary=True)["flops"]
    assert abs(rotary - plain) <= 2 * LONG * 8 * 4


def test_twice_the_tokens_cost_twice():
    method = ll.Polynomial(2, block_size=128)
    one, two = (
        count_operations(lambda p: ll.gradient(p, method).gradient, abstract(n, causal=True))
        for n in (4096, 8192)
    )
    assert one["flops"] * 1.99 < two["flops"] < one["flops"] * 2.01


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("names", "method", "message"),
    [
        (("window",), polynomial(2), "window: got 3, expected none: Polynomial"),
        (("segments",), polynomial(3), "degree with segments: got 3, expected an even"),
        (("segments",), ll.Polynomial(2, "fitted"), "series of a Polynomial with segments: got"),
        (("causal", "segments"), polynomial(3), "degree with segments: got 3, expected an even"),
        (
            ("causal",),
            ll.Polynomial(2, "chebyshev"),
            "series of a Polynomial with causal: got 'cheb",
        ),
    ],
)
def test_what_it_cannot_do_it_refuses_by_name(names, method, message):
    with pytest.raises(ValueError, match=message):
        ll.gradient(having(*names), method)


@pytest.mark.parametrize("series", ["chebyshev", *later("fitted")])
def test_other_series_know_rotations_and_padding(series):
    p = having("rotations", "key_mask", reach=0.7)
    want = masked_reference.loss_and_gradient(p)[1]
    got = PROMISED(p, polynomial(6, series=series))
    assert_close(got.gradient, want, 1e-4)
    # of other series than Taylor's nothing is proved
    assert all(np.isinf(x) for x in arrays(got.bound).values())
    p = replaced(p, rotations=None)
    assert np.isfinite(GRADIENT(p, polynomial(6, series=series)).loss)
