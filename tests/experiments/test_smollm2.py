"""The embedded heads of a decoder: what the file holds, and the problems built on it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import minilm, smollm2
from lora_limits.gradients.exact import dense_terms
from lora_limits.problem import projections
from tests.support.smollm2 import smollm2 as folder
from tests.support.tools import extra, quick_jit

HEADS = [(4, 3), (24, 5)]


def turned(x, base):
    """Rotary positions by complex numbers."""
    half = x.shape[1] // 2
    at = np.arange(len(x))[:, None] * base ** (-np.arange(half)[None] / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * at)
    return np.hstack([z.real, z.imag])


def causal(x, weights, base):
    """(scores, output) of the frozen head, dense."""
    q, k = (turned(x @ weights[n], base) for n in ("query", "key"))
    scores = np.where(np.tri(len(x), dtype=bool), q @ k.T / 8, -np.inf)
    e = np.exp(scores - scores.max(1, keepdims=True))
    return scores, e / e.sum(1, keepdims=True) @ x @ weights["value"]


def test_the_file_stays_below_three_megabytes_and_holds_what_its_readme_says():
    assert smollm2.PATH.stat().st_size < 3_000_000
    arrays = minilm.load(smollm2.PATH)
    assert smollm2.heads() == tuple(HEADS)
    assert smollm2.tokens() == 2048
    assert arrays["rotary_base"] == 1e5
    assert 2 < arrays["loss"] < 3
    assert arrays["layer4_x"].shape == (2048, 576)
    assert arrays["layer4_key1"].shape == arrays["layer24_query5"].shape == (576, 64)
    readme = smollm2.PATH.with_name("README.md").read_text(encoding="utf-8")
    assert "head 3, score range 21.5" in readme
    assert "head 5, 13.7" in readme


@pytest.mark.parametrize(("layer", "head"), HEADS)
def test_the_recorded_score_range_is_that_of_the_rounded_head(layer, head):
    x, weights = smollm2.inputs(layer, head, length=2048)
    base = 1e5
    q, k = (turned(x @ weights[n], base) for n in ("query", "key"))
    scores = q @ (k - k.mean(0)).T / 8
    seen = np.abs(scores[np.tri(2048, dtype=bool)]).max()
    assert seen == pytest.approx(smollm2.score_range(layer, head), rel=3e-2)


def test_the_target_is_the_causal_output_less_the_gradient_of_the_loss():
    p = smollm2.problem(4, 3, length=700, dtype="float64", size=0.5)
    x, weights = smollm2.inputs(4, 3, length=700)
    output = causal(x, weights, 1e5)[1]
    residual = output - np.asarray(p.target)
    shares = np.sqrt(np.mean(residual**2) / np.mean(output**2))
    assert shares == pytest.approx(0.5, rel=1e-6)
    # The frozen head's residual is dO, as the loss gave it for each token.
    given = minilm.load(smollm2.PATH)
    rows = given["layer4_cotangent3"][:700] * given["layer4_cotangent3_rows"][:700]
    rows = rows * given["layer4_cotangent3_columns"]
    np.testing.assert_allclose(
        residual / np.linalg.norm(residual), rows / np.linalg.norm(rows), atol=1e-7
    )
    zero = jax.tree.map(jnp.zeros_like, p.adapters)
    frozen = dense_terms(dataclasses.replace(p, adapters=zero))
    np.testing.assert_allclose(frozen["c"], residual, atol=1e-10)


def test_the_adapters_are_as_small_as_an_encoders_and_may_be_some_of_three():
    p = smollm2.problem(24, 5, adapt=("key",), rank=3, length=8)
    assert set(p.adapters) == {"key"}
    update = np.asarray(p.adapters["key"].b @ p.adapters["key"].a)
    size = np.linalg.norm(p.weights.key)
    assert np.linalg.norm(update) == pytest.approx(0.02 * size, rel=1e-4)
    assert p.dtype == jnp.float32
    assert (p.causal, p.beta, p.scale) == (True, 1 / 8, 1.0)


def test_rows_as_they_meet_have_the_scores_of_the_problem():
    p = smollm2.problem(4, 3, length=64, dtype="float64")
    met, before = smollm2.as_they_meet(p), smollm2.as_they_meet(p, rotated=False)
    q, k, _ = projections(p)
    np.testing.assert_allclose(met.x_query @ met.x_key.T, q @ k.T, atol=1e-10)
    np.testing.assert_allclose(turned(np.asarray(before.x_key), 1e5), k, atol=1e-8)
    assert not met.causal
    report = quick_jit(ll.norm_report)(met)
    assert float(report.score_bound_raw) >= float(jnp.abs(q @ k.T).max()) / 8
    # A rotation keeps lengths, not the largest entry.
    assert not math.isclose(float(report.query), float(quick_jit(ll.norm_report)(before).query))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 0}, r"\(layer, head\): got \(4, 0\)"),
        ({"length": 0}, "length: got 0, expected 1 to 2048"),
        ({"length": 2049}, "length: got 2049, expected 1 to 2048"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        smollm2.problem(**{"layer": 4, "head": 3} | arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_every_head_of_the_model_is_rebuilt_from_its_problem(tmp_path):
    """270 of 270 on 512 tokens, against what transformers' own attention puts out, and gradients of
    the loss in it.
    """
    torch, transformers = extra("torch"), extra("transformers")
    from experiments.data import make_smollm2_heads as script

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder(), dtype=torch.float32, attn_implementation="eager"
    )
    ids = script.topic_tokens(folder(), 512)
    found = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, given: (given[0].retain_grad(), found.append(given[0]))[1]
        )
        for layer in model.model.layers
    ]
    given = torch.as_tensor(ids.astype(np.int64))[None]
    model(given, labels=given).loss.backward()
    for hook in hooks:
        hook.remove()
    arrays = script.make(folder(), ids, dict.fromkeys(range(30), 9), whole=True)
    path = tmp_path / "every.npz"
    np.savez(path, **arrays)
    assert len(smollm2.heads(path)) == 270
    for layer, head in smollm2.heads(path):
        own = slice(64 * head, 64 * head + 64)
        x, weights = smollm2.inputs(layer, head, length=512, path=path)
        want = found[layer].detach().numpy()[0, :, own]
        output = causal(x, weights, 1e5)[1]
        assert np.linalg.norm(output - want) < 5e-3 * np.linalg.norm(want), (layer, head)
        p = smollm2.problem(layer, head, length=512, path=path)
        residual = output - np.asarray(p.target)
        dO = found[layer].grad.numpy()[0, :, own]
        cosine = (residual * dO).sum() / np.linalg.norm(residual) / np.linalg.norm(dO)
        assert cosine > 0.999, (layer, head)
