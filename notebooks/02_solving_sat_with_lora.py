# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Solving SAT with a LoRA gradient
#
# Theorem 4.1 says: once the scores of attention are of size $\log L$, no algorithm computes LoRA
# gradients in $O(L^{2-\delta})$ unless the Strong Exponential Time Hypothesis fails. Its proof
# turns a fast gradient into a fast algorithm for a problem that is believed to have none. A proof
# like that is a program, so let us run it: below, a SAT solver that learns about its formula from
# LoRA gradients and from nothing else.

# %%
import math

import jax
import matplotlib.pyplot as plt
import numpy as np

import lora_limits as ll
from lora_limits import hardness
from lora_limits.hardness import instances
from lora_limits.hardness.gadgets import inverse_noise

rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. The oracle
#
# Everything below is given one function, from a `LoRAProblem` to the gradients of its adapters, and
# may call nothing else. We wrap the exact gradient to count the calls, and keep the problems it was
# shown.

# %%
exact = hardness.gradient_oracle(ll.Exact())
shown = []


def oracle(problem):
    shown.append(problem)
    return exact(problem)


# %% [markdown]
# ## 2. Orthogonal vectors
#
# Given two sets of binary vectors, is there a pair with $\langle a_i, b_j\rangle = 0$? The queries
# are the $a_i$, the keys the $-b_j$, so the score of a pair is $-\beta_0\langle a_i, b_j\rangle$:
# zero for an orthogonal pair, at most $-\beta_0$ for any other. Some more keys, the pads, have
# score just low enough that together they weigh as much as one score of zero. Values are 1 on real
# keys and 0 on pads, so row $i$ of the output is $\tau_i = o_i/(1+o_i)$: at least one half if $a_i$
# has a partner, and nearly nothing if not.

# %%
a, b = instances.random_orthogonality(rng, n=100, width=24, answer=True)
print("by brute force: ", instances.has_orthogonal_pair(a, b))
print("by LoRA gradient:", hardness.orthogonal_vectors(a, b, oracle))

# %%
a, b = instances.random_orthogonality(rng, n=100, width=24, answer=False)
print("by brute force: ", instances.has_orthogonal_pair(a, b))
print("by LoRA gradient:", hardness.orthogonal_vectors(a, b, oracle))

# %% [markdown]
# A `Decision` is true or false, and says what it stands on. `margin` is the error in the gradient
# that it would take
# to turn the answer; `tolerance` is what the derivation guarantees. Now look at one of the problems
# the oracle was shown: a rank-1 adapter, freshly initialised with $B = 0$, and a target $Y = 0$.
# One entry of its gradient is the answer. (The grey rows spell out the vector of the set $a$ that
# has a partner.)

# %%
problem = shown[0]
print(
    {name: (x.a.shape, x.b.shape) for name, x in problem.adapters.items()},
    "tokens:",
    len(problem.x_query),
)
with jax.enable_x64(True):
    gradient = np.asarray(exact(problem)["query"].b)[:, 0]
plt.figure(figsize=(5.5, 1.8), layout="constrained")
plt.bar(np.arange(len(gradient)), gradient, color=["#999999"] * (len(gradient) - 1) + ["#D55E00"])
plt.xlabel("row of $\\partial\\ell/\\partial B$, the last one is the readout")
plt.title("a gradient that says YES", loc="left")
plt.show()

# %% [markdown]
# ## 3. SAT
#
# Split the variables in two halves and list the $2^{N/2}$ assignments of each. For each assignment
# write a vector
# over the clauses, with 1 where it does *not* satisfy the clause. Two halves fit together exactly
# if their vectors
# are orthogonal. For 12 variables that is 64 vectors a side:

# %%
for trial in range(6):
    clauses = instances.random_3sat(rng, variables=12, ratio=4.26 if trial % 2 else 6.5)
    model, cost = hardness.find_model(clauses, oracle)
    verdict = (
        "no model"
        if model is None
        else f"{model}, which satisfies them: {hardness.satisfies(model, clauses)}"
    )
    print(f"{len(clauses)} clauses, {cost.calls} gradients, {cost.tokens} tokens: {verdict}")

# %% [markdown]
# `find_model` fixes one variable after the other, asking each time whether what is left can be
# satisfied, and checks the model against the clauses in the end. No SAT solver is hidden here:
# replace the oracle by one that returns zeros, and every formula becomes unsatisfiable.

# %%
clauses = [[1, 2], [-1, 3], [-2, -3]]
silent = hardness.satisfiable(clauses, lambda problem: jax.tree.map(np.zeros_like, exact(problem)))
print("by gradients:", bool(hardness.satisfiable(clauses, oracle)), "  by zeros:", bool(silent))

# %% [markdown]
# On the command line: `lora-limits solve FORMULA.cnf`.
#
# ## 4. How wrong may the gradient be?
#
# The theorem forbids approximate gradients too. Nearest neighbours with a gap is the problem its
# proof starts from:
# is some Hamming distance at most $t$, given that otherwise all are at least $t + \Delta$? An
# adversary adds an error of one size to every entry of the gradient, with the sign that hurts.

# %%
n, width, distance, gap = 64, 36, 2, 4
print(" error / tolerance:   0.5   0.99   1.5   2.5")
for answer in (True, False):
    a, b = instances.clustered_neighbours(rng, n, width, distance, gap, answer)
    tolerance = hardness.nearest_neighbours(a, b, distance, gap, exact).tolerance
    said = []
    for factor in (0.5, 0.99, 1.5, 2.5):
        error = factor * tolerance * (-1 if answer else 1)
        noisy = lambda problem, e=error: jax.tree.map(lambda x: np.asarray(x) + e, exact(problem))  # noqa: E731
        said.append(
            "right"
            if bool(hardness.nearest_neighbours(a, b, distance, gap, noisy)) is answer
            else "WRONG"
        )
    print(f" {'YES' if answer else 'NO':3}, {tolerance:.3f}:  ", *said)

# %% [markdown]
# ## 5. The scores must be large
#
# All of this needs $\beta_0$ large enough to tell one pair from $n^2$ others, and so scores of size
# $R = \Theta(\log n)$ and, at temperature $1/d$, $\Gamma = \sqrt{R} = \Theta(\sqrt{\log n})$. Turn
# the scores down and the same exact oracle no longer separates: this is one side of the phase
# transition. (That shows this gadget failing, not that the problem is easy; the other side, that
# gradients *are* easy there, is Theorem 3.1.)

# %%
strengths = np.linspace(0.3, 1.1, 9)
margins = {True: [], False: []}
for answer in margins:
    a, b = instances.clustered_neighbours(rng, n, width, distance, gap, answer)
    gadget = hardness.hamming_gadget(a, b, distance, gap)
    need = inverse_noise(gadget, math.log(100) / 2)
    for strength in strengths:
        decision = hardness.decide_by_readout(gadget, exact, beta0=need * strength**2)
        margins[answer].append(decision.margin / (need * strength**2))
plt.figure(figsize=(5.5, 2.4), layout="constrained")
x = strengths * math.sqrt(need * width / math.log(n))
plt.plot(x, margins[True], "o-", color="#0072B2", label="YES")
plt.plot(x, margins[False], "s-", color="#D55E00", label="NO")
plt.axhline(0, color="#999999", linewidth=0.8)
plt.yscale("symlog", linthresh=0.1)
plt.xlabel(r"$\Gamma / \sqrt{\ln n}$")
plt.ylabel("margin of YES")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 6. The reduction of the paper, and a repair
#
# The proof behind Lemma E.1 takes another road: it walks along adapters $A = [\lambda I, 0]$,
# integrates $F'(\lambda)
# = 2\,\mathrm{tr}(\partial\ell/\partial A)$, and reads $\sum_i \tau_i^2$ from $F(1)$. As published,
# the integral is a left Riemann sum on $\log^4 n$ nodes. It must be right to 1/16. It is not, and
# Gauss-Legendre nodes are.

# %%
a, b = instances.random_neighbours(rng, n, width, distance, gap, answer=False)
gadget = hardness.hamming_gadget(a, b, distance, gap)
beta0 = inverse_noise(gadget, math.log(8) / 2)
with jax.enable_x64(True):
    along = lambda lam: hardness.path_problem(gadget, beta0, lam)  # noqa: E731
    truth = hardness.path_integral(along, exact, 64)
    for rule, nodes in (
        (hardness.left_riemann, math.ceil(math.log(n) ** 4)),
        (hardness.gauss_legendre, 12),
        (hardness.gauss_legendre, 24),
    ):
        error = abs(hardness.path_integral(along, exact, nodes, rule) - truth)
        print(f"{rule.__name__:15} {nodes:4} gradients: error {error:.1e}")
print(hardness.nearest_neighbours(a, b, distance, gap, exact, decider="path"))

# %% [markdown]
# ## 7. What would break SETH
#
# Replace `exact` by any gradient that takes $O(L^{1.99})$ time and stays within the tolerance on
# these problems, and SAT on $N$ variables falls to $O(2^{0.995 N})$. A degree-2 polynomial gradient
# is fast, and is no threat:

# %%
quadratic = hardness.gradient_oracle(ll.Polynomial(2))
for answer in (True, False):
    a, b = instances.clustered_neighbours(rng, 32, 8, 1, 1, answer)
    decision = hardness.nearest_neighbours(a, b, 1, 1, quadratic)
    print(
        "truth:", answer, " quadratic:", bool(decision), f" R / ln L = {decision.score_ratio:.1f}"
    )
