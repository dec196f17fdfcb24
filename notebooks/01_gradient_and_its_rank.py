# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # The gradient of LoRA attention, and its rank
#
# One attention head, a few LoRA adapters, and one question: how many features does the attention
# matrix need before the *gradient* is right? The paper answers with a norm bound: few, as long as
# Gamma stays below about sqrt(log L).

# %%
import sys

import jax

sys.path.append("..")  # experiments lies beside this folder, in the checkout
jax.config.update("jax_enable_x64", True)

import matplotlib.pyplot as plt
import numpy as np

import lora_limits as ll
from experiments.problems import minilm
from lora_limits.gradients.exact import dense_terms

gradient = jax.jit(ll.gradient, static_argnames="method")

# %% [markdown]
# ## An exact gradient
#
# A `LoRAProblem` is the paper's Definition 1.2: inputs, frozen weights, adapters, a target. Here
# the query and value projections are adapted and both factors of the scores have max norm exactly
# Gamma.

# %%
problem = ll.random_problem(jax.random.key(0), length=512, width=4, rank=2, gamma=1.0)
exact = gradient(problem, method=ll.Exact())
{name: (adapter.a.shape, adapter.b.shape) for name, adapter in exact.gradient.items()}

# %% [markdown]
# ## Singular values of the attention matrix as Gamma grows
#
# Everything the gradient needs is in f, the softmax of the scores. Its spectrum falls off a cliff
# while the norms are small, and the cliff walks to the right as Gamma grows.

# %%
fig, ax = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
for gamma in (0.5, 1.0, 2.0, 4.0):
    p = ll.random_problem(jax.random.key(0), length=512, width=4, rank=2, gamma=gamma)
    values = np.linalg.svd(np.asarray(dense_terms(p)["f"]), compute_uv=False)
    ax.semilogy(np.arange(1, len(values) + 1), values / values[0], label=f"Gamma = {gamma:g}")
ax.set(xlabel="index", ylabel="singular value of f / largest", xlim=(0, 200), ylim=(1e-16, 2))
ax.legend()
plt.show()

# %% [markdown]
# ## The approximation and its certificate
#
# `Polynomial(degree)` replaces exp by a polynomial of the scores: k = binom(d + degree, degree)
# features, never an L x L matrix. The result carries a certified bound on the max-norm error of
# every array; the table holds it against the truth.

# %%
for degree in (2, 5):
    result = gradient(problem, method=ll.Polynomial(degree))
    for name in result.gradient:
        error = float(abs(result.gradient[name].a - exact.gradient[name].a).max())
        bound = float(result.bound[name].a)
        assert error <= bound
        print(
            f"degree {degree}  k = {result.rank:4d}  dA of {name:6s} error {error:.1e}  certified {bound:.1e}"
        )

# %% [markdown]
# `choose` turns a tolerance into a method, and stays exact where nothing cheaper certifies it.

# %%
for gamma in (0.5, 4.0):
    p = ll.random_problem(jax.random.key(1), length=2048, width=4, rank=2, gamma=gamma)
    report = jax.jit(ll.norm_report)(p)
    largest = max(
        float(abs(x).max()) for x in jax.tree.leaves(gradient(p, method=ll.Exact(1024)).gradient)
    )
    print(
        f"Gamma = {gamma}: Gamma / sqrt(ln L) = {float(report.gamma_ratio):.2f}, "
        f"R / ln L = {float(report.score_ratio):.2f} -> {ll.choose(p, 1e-2 * largest)}"
    )

# %% [markdown]
# ## A real head
#
# The same on a head of all-MiniLM-L6-v2 reading Python's documentation. Centring the keys and
# queries changes nothing in exact arithmetic and takes much of the norm away; what is left decides.

# %%
for layer, head in ((5, 2), (2, 11)):
    p = minilm.problem(layer, head, length=256, dtype="float64")
    report = jax.jit(ll.norm_report)(p)
    values = np.linalg.svd(np.asarray(dense_terms(p)["f"]), compute_uv=False)
    print(
        f"layer {layer} head {head}: Gamma {float(report.gamma):.2f} raw, {float(report.gamma_centred):.2f} centred, "
        f"threshold {report.threshold:.2f}; rank of f at 1 %: {int((values > 1e-2 * values[0]).sum())} of 256"
    )

# %%
p = minilm.problem(5, 2, length=256, dtype="float64", adapt=("query", "value"))
truth = gradient(p, method=ll.Exact()).gradient
for degree in (1, 3):
    result = gradient(p, method=ll.Polynomial(degree))
    error = float(
        np.linalg.norm(result.gradient["query"].a - truth["query"].a)
        / np.linalg.norm(truth["query"].a)
    )
    print(
        f"degree {degree}: k = {result.rank}, relative error of dA {error:.2g}, normaliser {float(result.normaliser):.2g}"
    )
