"""LoRA attention as a module: against its definition written out, what it must not see, and its
heads as problems.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_limits as ll
from lora_limits.nn import per_layer
from lora_limits.nn.lora import LoRA, LoRAAttention, Norm
from lora_limits.training import loop
from tests.support.plain_transformer import attend, average, logits, make, tokens
from tests.support.tools import quick_jit

FULL = LoRA(rank=2, alpha=3.0, adapt=("query", "key", "value"))


def layer(lora=FULL, seed=0, **options):
    """A float64 layer of two heads of width 3 on d_model 5, its parameters all away from zero."""
    rngs = nnx.Rngs(seed)
    graphdef, params = nnx.split(
        LoRAAttention(5, 2, 3, lora, **({"method": ll.Exact(), "rngs": rngs} | options))
    )
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graphdef,
        jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x, float) + 0.4 * rng.normal(size=x.shape)), params
        ),
    )


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def value_and_gradients(function, params, x, cotangent):
    def run(params, x):
        out, back = jax.vjp(function, params, x)
        return out, back(cotangent)

    return quick_jit(run)(params, x)


@pytest.mark.parametrize(
    "options",
    [
        {"softmax_1": True},
        {"is_causal": True, "softmax_1": True, "bias": True},
        {"normalised": True, "is_causal": True},
    ],
    ids=str,
)
def test_a_layer_and_its_gradients_are_those_of_the_definition(options):
    """Each option, alone and together: exp(s) / (1 + sum exp(s)) in particular, and the derivative
    through it.
    """
    module = layer(**options)
    graphdef, params = nnx.split(module)
    x, cotangent = normal(2, 7, 5), normal(2, 7, 5, seed=2)
    flags = {"causal": options.get("is_causal", False)} | {
        n: options.get(n, False) for n in ("softmax_1", "normalised")
    }

    def plain(params, x):
        p = nnx.to_pure_dict(params)
        return jax.vmap(lambda x: attend(p, x, FULL.scale, heads=2, width=3, **flags))(x)

    got = value_and_gradients(
        lambda params, x: nnx.merge(graphdef, params)(x), params, x, cotangent
    )
    want = value_and_gradients(plain, params, x, cotangent)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"layers": 2}, {"classes": None, "softmax_1": True, "normalised": True}], ids=str
)
def test_a_transformer_is_its_definition(options):
    model = make(**options)
    graphdef, params = nnx.split(model)
    got = quick_jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, tokens())
    want = quick_jit(lambda p, t: logits(nnx.to_pure_dict(p), t, model.shape, 1.5))(
        params, tokens()
    )
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("method", [ll.Exact(), ll.Polynomial(4, block_size=2)], ids=str)
def test_a_decoder_sees_nothing_of_what_is_to_come(method):
    model = make(classes=None, softmax_1=True)
    model.set_methods([method])
    graphdef, params = nnx.split(model)
    run = quick_jit(lambda t: nnx.merge(graphdef, params)(t))
    one = tokens()
    two = one.at[:, 5].set((one[:, 5] + 1) % 7)
    before, after = run(one), run(two)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (jnp.abs(before - after)[:, 5:].max((0, 2)) > 1e-6).all()


def test_the_adapters_scale_with_alpha_over_r_or_over_its_root():
    assert LoRA(rank=4, alpha=2.0).scale == 0.5
    assert LoRA(rank=4, alpha=2.0, scaling="alpha/sqrt(r)").scale == 1.0
    x = normal(1, 3, 5)
    once, twice = (layer(LoRA(rank=2, alpha=alpha, adapt=("value",))) for alpha in (1.0, 2.0))
    base = x @ once.value.kernel[...]
    np.testing.assert_allclose(2 * (once.value(x) - base), twice.value(x) - base, atol=1e-12)


def test_only_what_is_adapted_has_adapters_and_the_filter_finds_them():
    module = layer(LoRA(rank=2, adapt=("key",)))
    assert nnx.to_pure_dict(nnx.state(module, nnx.LoRAParam)).keys() == {"key"}
    assert nnx.to_pure_dict(nnx.state(module, loop.BASE)).keys() == {
        "query",
        "key",
        "value",
        "output",
    }


@pytest.mark.parametrize("options", [{}, {"softmax_1": True, "bias": True}], ids=str)
def test_the_heads_as_problems_have_the_layers_own_gradients(options):
    """vmap of ll.gradient over the heads, B summed over them, against the vector-Jacobian product
    of the module.
    """
    graphdef, params = nnx.split(layer(**options))

    def run(params, x, cotangent):
        module = nnx.merge(graphdef, params)
        problem = per_layer.problem_of(module, x, cotangent)
        heads = jax.vmap(lambda p: ll.gradient(p, ll.Exact()).gradient)(problem)
        return heads, per_layer.adapter_gradient(module, x[None], cotangent[None], ll.Exact())

    got, want = quick_jit(run)(params, normal(7, 5), normal(7, 2, 3, seed=2))
    want = nnx.to_pure_dict(want)
    assert got.keys() == want.keys() == {"query", "key", "value"}
    for name, adapter in got.items():
        np.testing.assert_allclose(np.asarray(adapter.b)[:, :5].sum(0), want[name]["b"], atol=1e-12)
        np.testing.assert_allclose(
            np.concatenate(np.asarray(adapter.a), 1), want[name]["a"], atol=1e-12
        )


@pytest.mark.parametrize("normalised", [False, True])
def test_norms_are_those_of_the_rows_that_meet_in_the_scores(normalised):
    model = make(normalised=normalised, softmax_1=True)

    def run(tokens):
        attention, x = model.blocks[0].attention, model.trace(tokens)[1][0]
        (report,) = per_layer.norms(model, tokens)
        return report.gamma, report.score_bound_raw, report.query_update, attention.rows(x)

    gamma, bound, update, (q, k, _) = jax.tree.map(np.asarray, quick_jit(run)(tokens()))
    np.testing.assert_allclose(
        gamma, np.maximum(abs(q).max((1, 3)), abs(k).max((1, 3))), atol=1e-12
    )
    assert (bound >= abs(np.einsum("blhd,bmhd->bhlm", q, k)).max((2, 3)) / np.sqrt(3)).all()
    assert (update > 0).all() != normalised


def cooler(q, k, v, is_causal):
    """Softmax attention at 0.9 of the scores."""
    return ll.attention(0.9 * q, k, v, method=ll.Exact())


def test_the_method_chosen_is_the_first_within_the_tolerance():
    """And the errors behind the choice are those of the layer's own gradients."""
    model, data = make(), (tokens(), jnp.asarray([0, 2], jnp.int32))
    ladder = [average, cooler]
    ((coarse, fine),) = per_layer.gradient_errors(model, *data, loop.loss, methods=ladder)

    def gradients(tokens, labels):
        (x,), (cotangent,) = per_layer.cotangents(model, tokens, lambda z: loop.loss(z, labels))
        layer = model.blocks[0].attention
        return [per_layer.adapter_gradient(layer, x, cotangent, m) for m in (ll.Exact(), cooler)]

    exact, near = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)])
        for g in quick_jit(gradients)(*data)
    )
    np.testing.assert_allclose(
        fine, np.linalg.norm(near - exact) / np.linalg.norm(exact), rtol=1e-8
    )
    assert fine < coarse / 2
    choices = [(2 * coarse, average), ((fine + coarse) / 2, cooler), (fine / 2, per_layer.EXACT)]
    for tolerance, method in choices:
        assert per_layer.choose_methods(
            model, *data, loop.loss, ladder=ladder, tolerance=tolerance
        ) == (method,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_layers_return_the_dtype_that_they_are_given(dtype):
    """Computed in no less than that of the parameters, here single precision."""
    rngs = nnx.Rngs(3)
    module = LoRAAttention(5, 2, 3, FULL, method=ll.Polynomial(2), bias=True, rngs=rngs)
    x = normal(1, 4, 5)
    want = module(x)
    for y, of_wide in ((module(x.astype(dtype)), want), (Norm(5)(x.astype(dtype)), Norm(5)(x))):
        assert y.dtype == dtype
        tolerance = 8 * float(jnp.finfo(dtype).eps) + 1e-6
        np.testing.assert_allclose(y.astype(jnp.float64), of_wide, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: LoRA(rank=0), "rank: got 0, expected"),
        (lambda: LoRA(scaling="alpha"), "scaling: got 'alpha', expected"),
        (lambda: LoRA(adapt=("head",)), r"adapt: got \('head',\), expected"),
        (lambda: make(lora=LoRA(adapt=("gate",))), r"adapt: got \('gate',\), expected"),
        (
            lambda: per_layer.problem_of(layer(LoRA(adapt=("output",))), normal(3, 5)),
            r"layer: got adapters of \('output',\), expected",
        ),
        (lambda: layer(key_heads=3), "key_heads: got 3, expected a divisor of 2"),
        (lambda: layer(rotary_base=1e4), "width: got 3, expected an even one"),
        (lambda: LoRA(adapt=["query"]), r"adapt: got \['query'\], expected a tuple"),
        (lambda: LoRA(alpha=float("nan")), "alpha: got nan, expected"),
        (lambda: LoRA(alpha="16"), "alpha: got '16', expected a finite number"),
        (
            lambda: LoRAAttention(4, 0, 2, FULL, method=ll.Exact(), rngs=nnx.Rngs(0)),
            "heads: got 0, expected",
        ),
        (lambda: make().set_methods([ll.Exact()] * 2), "methods: got 2, expected 1"),
        (lambda: make()(tokens(length=9)), "tokens: got 9 of them, expected at most 8"),
        (
            lambda: per_layer.problem_of(layer(normalised=True), normal(3, 5)),
            "layer: got query-key normalisation",
        ),
        (
            lambda: per_layer.problem_of(layer(is_causal=True), normal(3, 5), normal(3, 2, 3)),
            "cotangent: got one",
        ),
        (
            lambda: per_layer.choose_methods(make(), 0, 0, loop.loss, ladder=[], tolerance=0),
            "tolerance: got 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
