"""Exact gradients of problems against the attention of transformers' own decoders, in double
precision: Llama (rotary, grouped keys), Mistral (a window), GPT-2 (biases), with padding.
"""

import numpy as np
import pytest

import lora_limits as ll
from tests.support.tools import arrays, assert_close, extra, quick_jit

EXACT = quick_jit(ll.gradient, static_argnums=1)
L, WIDTH, HEADS, D = 11, 12, 3, 4
SCALE = 0.5
REAL = np.arange(L) < 9  # the last two tokens are padding


def llama(transformers, window=None):
    """(model, its attention) of one layer, heads on one key head, output projection the identity."""
    options = {
        "vocab_size": 20,
        "hidden_size": WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": D,
        "rope_theta": 100.0,
        "attn_implementation": "eager",
    }
    if window is None:
        model = transformers.LlamaModel(transformers.LlamaConfig(**options))
    else:
        config = transformers.MistralConfig(sliding_window=window, **options)
        model = transformers.MistralModel(config)
    return model, model.layers[0].self_attn


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=WIDTH, n_layer=1, n_head=HEADS, attn_implementation="eager"
    )
    model = transformers.GPT2Model(config)
    return model, model.h[0].attn


def run(torch, model, attention, output, mask):
    """(tokens that the attention reads, the target): the loss of its output is differentiated."""
    seen = {}

    def keep(module, args, kwargs, result):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["x"], seen["out"] = x.detach().numpy()[0], result[0][0]

    hook = attention.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for p in attention.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype) * 0.6)
        output.weight.copy_(torch.eye(WIDTH, dtype=torch.float64))
        if getattr(output, "bias", None) is not None:
            output.bias.zero_()
    ids = torch.arange(L)[None] % 20
    model(ids, attention_mask=torch.as_tensor(mask)[None].long())
    hook.remove()
    target = np.random.default_rng(5).normal(size=(L, WIDTH))
    residual = (seen["out"] - torch.as_tensor(target))[torch.as_tensor(mask)]
    (0.5 * (residual**2).sum()).backward()
    return seen["x"], target


def head_problem(x, target, weights, head, **fields):
    """The problem of a head whose adapted weights are the model's."""
    rng = np.random.default_rng(6)
    adapters, frozen = {}, {}
    for name, w in weights.items():
        a, b = rng.normal(size=(2, D)), rng.normal(size=(x.shape[1], 2))
        adapters[name] = ll.Adapter(a, b)
        frozen[name] = w - SCALE * b @ a
    return ll.LoRAProblem(
        x,
        x,
        x,
        target[:, head * D : (head + 1) * D],
        weights=ll.AttentionWeights(**frozen),
        adapters=adapters,
        scale=SCALE,
        beta=D**-0.5,
        causal=True,
        query_mask=REAL,
        key_mask=REAL,
        **fields,
    )


def assert_same(problems, weight_gradients):
    """Each problem's gradient, and for shared keys the sum over heads, from the model's dl/dW."""
    for method in (ll.Exact(), ll.Exact(block_size=4)):
        got = [EXACT(p, method).gradient for p in problems]
        for name, of_heads in weight_gradients.items():
            found = [g[name] for g in got]
            # of one projection for all heads the model has one gradient
            if len(of_heads) == 1:
                found = [ll.Adapter(sum(g.a for g in found), sum(g.b for g in found))]
            for adapter, p, dw in zip(found, problems[: len(found)], of_heads, strict=True):
                own = p.adapters[name]
                want = ll.Adapter(SCALE * own.b.T @ dw, SCALE * dw @ own.a.T)
                # their softmax and their angles are of single precision
                assert_close({name: adapter}, {name: want}, 2e-5)
                assert all(np.abs(x).max() > 1e-3 for x in arrays({name: want}).values())


@pytest.mark.parametrize("window", [None, 3])
def test_llama_and_mistral(window):
    torch, transformers = extra("torch"), extra("transformers")
    torch.manual_seed(0)
    model, attention = llama(transformers, window)
    model = model.double().eval()
    x, target = run(torch, model, attention, attention.o_proj, REAL)
    full = {
        "query": attention.q_proj.weight,
        "key": attention.k_proj.weight,
        "value": attention.v_proj.weight,
    }

    def columns(w, place):
        return w[place * D : (place + 1) * D].T.numpy()

    def of_head(of, head):
        return {n: columns(of(w), head if n == "query" else 0) for n, w in full.items()}

    fields = {"rotations": ll.rotary_angles(L, D, base=100.0), "window": window}
    weights = [of_head(lambda w: w.detach(), h) for h in range(HEADS)]
    problems = [head_problem(x, target, w, h, **fields) for h, w in enumerate(weights)]
    gradients = [of_head(lambda w: w.grad, h) for h in range(HEADS)]
    # the keys' and values' weights are shared: one gradient, that of all heads
    by_name = {n: [g[n] for g in gradients] for n in full}
    assert_same(problems, {"query": by_name["query"]})
    first = problems[0].adapters
    shared = [
        ll.LoRAProblem(
            *(x, x, x, p.target),
            weights=p.weights,
            adapters=first | {"query": p.adapters["query"]},
            scale=SCALE,
            beta=p.beta,
            causal=True,
            query_mask=REAL,
            key_mask=REAL,
            **fields,
        )
        for p in problems
    ]
    assert_same(shared, {n: by_name[n][:1] for n in ("key", "value")})


def test_gpt2():
    torch, transformers = extra("torch"), extra("transformers")
    torch.manual_seed(1)
    model, attention = gpt2(transformers)
    model = model.double().eval()
    x, target = run(torch, model, attention, attention.c_proj, REAL)
    # a bias is the weight of a column of ones
    x = np.concatenate([x, np.ones((L, 1))], 1)
    w, bias = attention.c_attn.weight, attention.c_attn.bias

    def of_head(of, head):
        both = np.concatenate([of(w).numpy(), of(bias).numpy()[None]])
        starts = {n: i * WIDTH + head * D for i, n in enumerate(("query", "key", "value"))}
        return {n: both[:, at : at + D] for n, at in starts.items()}

    weights = [of_head(lambda w: w.detach(), h) for h in range(HEADS)]
    problems = [head_problem(x, target, w, h) for h, w in enumerate(weights)]
    gradients = [of_head(lambda w: w.grad, h) for h in range(HEADS)]
    assert_same(problems, {n: [g[n] for g in gradients] for n in ("query", "key", "value")})
