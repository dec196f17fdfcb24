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
# # A cut through the map of your own
#
# The map of the phase boundary says how many features $k^\star$ a LoRA gradient needs, over the
# length $L$ and the bound $R$ of the scores. Its cells rest on a few exact rows of attention: the
# error of every degree comes from them at once, so no $L \times L$ matrix is ever made. Below: one
# cell, a cut through many, a family of inputs that the map does not have, and the law that explains
# all three.

# %%
import math

import jax

jax.config.update("jax_enable_x64", True)

import matplotlib.pyplot as plt
import numpy as np

from experiments.contenders.needed_degrees import needed
from experiments.contenders.sampled_degrees import scan
from experiments.problems import boxes
from lora_limits.polynomial import law
from paper_figures.command.finding import STORED, load

# %% [markdown]
# ## 1. One cell
#
# 4096 uniform tokens of width 8, all three projections adapted, $\max|Q| = \max|K| = \Gamma = 1$.
# `scan` draws 128 queries and says, for every array of the gradient and every degree, the relative
# error to expect over targets whose noise has variance 1, with a standard error. The target's mean
# is 0 here: the loss pulls the output to 0, and the noise is what labels do.

# %%
LENGTH, WIDTH = 4096, 8


def cell(family, gamma, length=LENGTH):
    """The errors of degrees 0 to 12 at one point of the map."""
    problem = boxes.problem(family, 0, length=length, width=WIDTH, rank=4, gamma=gamma)
    alike = family == boxes.GADGET  # tokens that repeat are looked at once each
    return scan(problem, highest=12, rows=128, noise=boxes.noise(family), alike=alike)


found = cell("uniform", 1.0)
for degree in range(1, 6):
    errors = [f"{name} {x[degree]:.1e}" for name, x in found.errors.items() if name.endswith("a")]
    worst = max(s[degree] / found.errors[name][degree] for name, s in found.spread.items())
    print(f"degree {degree}: {', '.join(errors)}  (standard errors to {worst:.0%})")

# %% [markdown]
# Odd degrees do better than the even ones above them: their leading error is of odd order in the
# score and cancels on average. So each parity is asked by itself, and between two of its degrees
# $k^\star$ is read off a straight line.

# %%
worst, _ = found.worst()
for tolerance in (1 / LENGTH, 0.01):
    need = needed(list(worst), tolerance, width=WIDTH, length=LENGTH)
    print(f"error {tolerance:.0e}: degree {need['degree']}, k = {need['features']}; {need}")

# %% [markdown]
# ## 2. A cut, with a family of your own
#
# A family is a function from a generator to tokens. Here is one that the map lacks: tokens in tight
# clusters, as sentences that say the same thing again.


# %%
def clustered(rng, length, width):
    """Sixteen centres, and a little around each."""
    centres = rng.uniform(-1, 1, (16, width))
    return centres[rng.integers(16, size=length)] + 0.05 * rng.normal(size=(length, width))


boxes.TOKENS["clustered"] = clustered
GAMMAS = [0.5, 0.71, 1.0, 1.41, 2.0, 2.83]

cut = {}
for family in ("uniform", "gaussian", boxes.GADGET, "clustered"):
    cut[family] = [
        needed(list(cell(family, g).worst()[0]), 1 / LENGTH, width=WIDTH, length=LENGTH)
        for g in GAMMAS
    ]
    print(family, [need["degree"] for need in cut[family]])

# %% [markdown]
# ## 3. Beside the rows that are kept
#
# The kept rows of the experiment `phase_boundary` are read as the figures read them. Where they have
# cells of this length and width they are drawn as crosses; other seeds, the same curves.

# %%
rows = load(STORED, "phase_boundary") or []
kept = [row["point"] | row["metrics"] for row in rows if row["point"]["kind"] == "accuracy"]
kept = [p for p in kept if (p["length"], p["width"]) == (LENGTH, WIDTH)]

ratios = [g**2 / math.log(LENGTH) for g in GAMMAS]
figure, axis = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
for n, (family, needs) in enumerate(cut.items()):
    exponents = [math.nan if x["exponent"] is None else x["exponent"] for x in needs]
    axis.plot(ratios, exponents, "o-", color=f"C{n}", label=family)
    mine = [p for p in kept if p["family"] == family and p["1/L"]["exponent"] is not None]
    x = [p["score_ratio"] for p in mine]
    axis.plot(x, [p["1/L"]["exponent"] for p in mine], "x", color=f"C{n}", alpha=0.5)
axis.axhline(1, color="black", linewidth=0.8)
axis.set_xscale("log")
axis.set_xlabel(r"$R / \ln L$")
axis.set_ylabel(r"$\log k^\star / \log L$")
axis.set_title(f"error 1/L at L = {LENGTH}, d = {WIDTH}")
axis.legend()
plt.show()

# %% [markdown]
# ## 4. The law
#
# A degree $g$ is enough where Taylor's remainder $\sum_{n>g}\rho^n/n!$ is below the tolerance. By
# the bound $\rho = R$; what a family needs says which $\rho = cR$ it behaves as if it had. The gadget
# attains its bound. Typical scores stay far below theirs, and $c$ says how far.

# %%
for family, needs in cut.items():
    shares = [
        law.radius_of(x["real"], 1 / LENGTH) / gamma**2
        for x, gamma in zip(needs, GAMMAS, strict=True)
        if x["real"] is not None and x["real"] > 1
    ]
    print(f"{family:10s} c = {np.exp(np.mean(np.log(shares))):.2f}  of {len(shares)} cells")
