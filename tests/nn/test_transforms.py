"""What JAX makes of attention: derivatives of both modes and twice over, remat, scan, export, flags."""

import functools
import logging

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from tests.support.tools import later, quick_jit

CHEAP = [ll.Exact(), ll.Polynomial(2, block_size=4)]
REVERSE_ONLY = [ll.Polynomial(2, block_size=4), ll.Skeleton(3), ll.SparseLowRank(3, 3)]


def inputs(seed=0, batch=1, tokens=9, heads=2, width=3):
    rng = np.random.default_rng(seed)
    shape = (batch, tokens, heads, width)
    return [jnp.asarray(0.5 * rng.normal(size=shape)) for _ in range(4)]


def call(method, **options):
    return functools.partial(ll.attention, method=method, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": ll.Exact()},
        {"method": ll.Exact(4), "is_causal": True},
        {"method": ll.Polynomial(2, block_size=4), "local_window_size": (2, 1)},
    ],
    ids=str,
)
def test_forward_derivatives_of_what_is_exact(options):
    q, k, v, t = inputs()
    mask = np.arange(9)[None] < 7

    def run(q):
        return ll.attention(q, k, v, mask=mask, **options)

    def both(q):
        forward = jax.jvp(run, (q,), (t,))[1]
        return forward, jax.linearize(run, q)[1](t), jax.vjp(run, q)[1](t)[0], jax.jacfwd(run)(q)

    jvp, linear, _, jacobian = quick_jit(both)(q)
    step = 1e-6
    slope = (run(q + step * t) - run(q - step * t)) / (2 * step)
    np.testing.assert_allclose(jvp, slope, atol=1e-8)
    np.testing.assert_allclose(linear, slope, atol=1e-8)
    np.testing.assert_allclose(jnp.tensordot(jacobian, t, axes=4), slope, atol=1e-8)


@pytest.mark.parametrize("method", [*REVERSE_ONLY[:2], *later(REVERSE_ONLY[2])], ids=str)
def test_forward_derivatives_of_the_others_are_refused_by_name(method):
    q, k, v, t = inputs()
    name = type(method).__name__
    with pytest.raises(TypeError, match=rf"derivative of {name}\(.*got a forward-mode.*or Exact"):
        jax.jvp(lambda q: ll.attention(q, k, v, method=method), (q,), (t,))
    with pytest.raises(TypeError, match=rf"derivative of {name}\("):
        jax.jacfwd(lambda q: ll.attention(q, k, v, method=method))(q)


@pytest.mark.parametrize("method", [*REVERSE_ONLY[:2], *later(REVERSE_ONLY[2])], ids=str)
def test_they_are_refused_inside_of_jit_too(method):
    """Where JAX itself names no function: inside, around and in a scan of jitted attention."""
    q, k, v, t = inputs()
    run = jax.jit(lambda v: ll.attention(q, k, v, method=method))

    def scanned(v):
        return jax.lax.scan(lambda v, _: (run(v), None), v, length=2)[0]

    name = type(method).__name__
    for function in (run, jax.vmap(run), scanned):
        x, y = (v[None], t[None]) if function not in (run, scanned) else (v, t)
        for jvp in (jax.jvp, jax.jit(jax.jvp, static_argnums=0)):
            with pytest.raises(TypeError, match=rf"derivative of {name}\(.*got a forward-mode"):
                jvp(function, (x,), (y,))


@pytest.mark.parametrize("causal", [*later(False), True])
def test_the_gradient_of_a_gradient(causal):
    """Of Polynomial too, whose derivative is written by hand; beside finite differences."""
    q, k, v, t = inputs(1)
    method = ll.Polynomial(2, block_size=4, centred=False)

    def slope(q):
        return jax.grad(lambda q: (call(method, is_causal=causal)(q, k, v) ** 2).sum())(q)

    run = quick_jit(lambda q: (slope(q), jax.grad(lambda q: (slope(q) * t).sum())(q)))
    step = 1e-5
    want = (run(q + step * t)[0] - run(q - step * t)[0]) / (2 * step)
    np.testing.assert_allclose(run(q)[1], want, atol=1e-6)


@pytest.mark.parametrize("method", [*CHEAP, *later(ll.Skeleton(3))], ids=str)
def test_layers_in_a_scan_with_rematerialisation(method):
    """As large models are written: the same gradient as of layers one after the other."""
    weights = 0.3 * jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 3)))
    x = inputs(3)[0]

    def layer(x, w):
        return x + call(method)(x, x, x @ w), None

    def scanned(weights):
        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).sum()

    def unrolled(weights):
        out = x
        for w in weights:
            out = layer(out, w)[0]
        return (out**2).sum()

    got, want = (quick_jit(jax.grad(f))(weights) for f in (scanned, unrolled))
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize(
    ("method", "causal"),
    [(CHEAP[1], True), *later((CHEAP[0], True), *((m, False) for m in (*CHEAP, ll.Skeleton(3))))],
    ids=str,
)
def test_an_export_serves_every_batch(method, causal):
    """jax.export with a symbolic number of sequences, masks included."""
    batch = jax.export.symbolic_shape("batch")[0]
    x = jax.ShapeDtypeStruct((batch, 9, 2, 3), np.float64)
    mask = jax.ShapeDtypeStruct((batch, 9), bool)

    def run(x, mask):
        return ll.attention(x, x, x, method=method, is_causal=causal, mask=mask)

    exported = jax.export.export(jax.jit(run))(x, mask)
    x = inputs(batch=3)[0]
    mask = np.arange(9)[None] < np.array([9, 7, 5])[:, None]
    np.testing.assert_allclose(exported.call(x, mask), run(x, mask), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("flag", ["jax_debug_nans", "jax_debug_infs"])
@pytest.mark.parametrize(
    "method",
    [*CHEAP, *later(ll.Skeleton(3), ll.SparseLowRank(3, 3), ll.AdaptedMonomials(10))],
    ids=str,
)
def test_no_infinity_and_no_nan_on_the_way(method, flag):
    """Masked, of queries that see nothing, causal where it may be; outside of jit, and inside."""
    q, k, v, _ = inputs(4)
    mask = np.arange(9)[None] % 4 > 0
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        for causal in (False, True) if method in CHEAP else (False,):
            run = call(method, is_causal=causal, mask=mask)
            out, back = jax.vjp(run, q, k, v)
            assert all(np.isfinite(x).all() for x in (out, *back(jnp.ones_like(v))))
    finally:
        jax.config.update(flag, before)


def test_outside_of_jit_it_is_two_programs(caplog):
    """One forward and one back; as hundreds of small ones it took half a minute to compile."""
    q, k, v, t = inputs(5, tokens=10)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.vjp(call(ll.Polynomial(2, block_size=5)), q, k, v)[1](t)
    compiled = [r for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
    assert 2 <= len(compiled) < 12, [r.getMessage()[:60] for r in compiled]
