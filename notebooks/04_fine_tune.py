# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning with almost-linear gradients
#
# The same small transformer, the same adapters, the same batches: once with exact attention, once
# with a polynomial for exp, whose gradient costs time linear in the length. Does the error of the
# gradient show in what is learnt?

# %%
import sys
from dataclasses import replace

import jax
import matplotlib.pyplot as plt
from flax import nnx

sys.path.append("..")  # experiments lies beside this folder, in the checkout

import lora_limits as ll
from experiments.training import tasks
from lora_limits.nn import per_layer
from lora_limits.nn.lora import LoRA
from lora_limits.nn.transformer import Shape, Transformer
from lora_limits.training import loop
from lora_limits.training.loop import Recipe

# %% [markdown]
# ## A base that tells prose from code
#
# Windows of 64 bytes of Python's standard library: its language reference or its code. Queries and
# keys of width 4 are normalised, so that no score passes sqrt(4) = 2, whatever training does: the
# norm bound that the theorems ask for.

# %%
source, target = (tasks.load("prose_or_code", 64, part) for part in tasks.PARTS)
shape = Shape(source.vocabulary, source.classes, 64, width=4, layers=1, normalised=True)
lora = LoRA(rank=4, alpha=8.0, adapt=("query", "key", "value"))
base = Transformer(shape, lora, rngs=nnx.Rngs(0))
recipe = Recipe(steps=100, rate=1e-2, every=100)
base.set_methods([loop.EXACT])
history = loop.train(base, source, recipe, what=loop.BASE)
print("prose or code: accuracy", history["accuracy"])

# %% [markdown]
# ## Its norms
#
# Gamma against sqrt(ln L), and the certified bound R of the centred scores against ln L, for every
# head. Almost linear time is possible while they are small; at 64 tokens "small" is not far from 1.

# %%
graphdef, params = nnx.split(base)
reports = jax.jit(lambda params, x: per_layer.norms(nnx.merge(graphdef, params), x))(
    params, target.test.tokens[:8]
)
for n, report in enumerate(reports, 1):
    gamma, score = (x.max(0) for x in (report.gamma_ratio, report.score_ratio))
    for head in range(shape.heads):
        print(
            f"layer {n} head {head}: Gamma / sqrt(ln L) = {gamma[head]:.2f}, R / ln L = {score[head]:.2f}"
        )

# %% [markdown]
# ## The adapters, on letters alone
#
# Docstrings against code, with all but letters taken out: harder, and new to the base.
# `Polynomial(2)` has
# k = binom(4 + 2, 2) = 15 features. Blocks of 16 tokens: a sequence that fits in one block would be
# computed exactly. `watch` holds the approximate gradient against the exact one at every
# evaluation.

# %%
methods = {"exact": loop.EXACT, "polynomial 2": ll.Polynomial(2, block_size=16)}
recipe = replace(recipe, steps=60, every=20)
runs, tuned = {}, {}
for name, method in methods.items():
    tuned[name] = nnx.clone(base)
    tuned[name].set_methods([method])
    runs[name] = loop.train(
        tuned[name], target, recipe, watch=None if name == "exact" else loop.compare
    )
    print(
        f"{name:12s} held-out loss {runs[name]['test_loss'][-1]:.3f}, accuracy {runs[name]['accuracy'][-1]:.2f}"
    )

# %% [markdown]
# Deployed under exact attention, the adapters that the polynomial trained are worth about as much:

# %%
deployed = loop.with_methods(tuned["polynomial 2"], [loop.EXACT])
print({name: round(x, 3) for name, x in loop.evaluate(deployed, target.test, recipe).items()})

# %% [markdown]
# ## Side by side

# %%
fig, axes = plt.subplots(1, 3, figsize=(8, 2.4), layout="constrained")
for name, run in runs.items():
    axes[0].plot(run["loss"], linewidth=0.8, label=name)
    axes[1].plot(run["steps"], run["test_loss"], "o-", label=name)
watched = runs["polynomial 2"]
axes[2].plot(watched["steps"], watched["error"], "o-", label="relative error")
axes[2].plot(watched["steps"], watched["cosine"], "s-", label="cosine")
for ax, title in zip(
    axes, ("training loss", "held-out loss", "gradient against exact"), strict=True
):
    ax.set(title=title, xlabel="step")
    ax.legend(fontsize=7)
plt.show()

# %% [markdown]
# An error of a tenth or two, yet the losses hardly differ: the noise of a batch of 16 is larger.
# `batch_and_rank` measures how large a batch must be before the error shows, `sensitivity` which
# tasks mind.
