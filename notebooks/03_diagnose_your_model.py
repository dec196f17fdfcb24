# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Would fast LoRA gradients pay in your model?
#
# The paper's answer hangs on norms: almost linear time while queries and keys are small, no
# subquadratic algorithm where they are not. `lora-limits diagnose` measures them, head by head, on
# a model folder and a text of yours:
#
#     pip install 'lora-limits[models]'
#     lora-limits diagnose MODEL_DIR --text FILE --out diagnosis
#
# Where the model has a loss (next tokens, masked tokens, or classes given with `--labels`), one
# backward pass of it provides dl/dO, the gradient for the output O of every head, and a head's
# problem is the one whose residual it is: target = O - s dl/dO, under the model's own mask and
# rotary positions. s is such that an error of the output changes the residual as much as it does in
# the model. Where there is no loss, as in a model of sentence embeddings, a stand-in takes its place,
# and the first line says so.
#
# `--adapter DIR` takes an adapter that peft wrote (else a random one), `--layers` and `--heads` name
# heads, `--length` and `--batch` the windows, `--table` prints a row for each head.
#
# This notebook reads what that command left for all-MiniLM-L6-v2 (six layers of twelve heads of
# width 32) on the documentation of CPython, with a random adapter of rank 4 on query and value.

# %%
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

sys.path.append("..")  # paper_figures lies beside this folder, in the checkout

import paper_figures
from lora_limits.diagnose import picture, report, summary

diagnosis = json.loads((Path(paper_figures.__file__).parent / "data" / "diagnose.json").read_text())
rows = [row for row in diagnosis["heads"] if not row["refused"]]
{name: diagnosis[name] for name in ("model", "adapter", "tolerance", "length", "windows")}

# %% [markdown]
# ## What to do, in ten lines

# %%
print("\n".join(summary.summary(diagnosis)))

# %% [markdown]
# ## The picture, and what it says in words
#
# Hatched: lengths to which the error was carried on, not measured.

# %%
with plt.rc_context(picture.RC):
    fig = plt.figure(figsize=(picture.WIDTH, picture.HEIGHT))
    picture.fill(fig, diagnosis)
    plt.show()

# %%
for line in report.words(diagnosis):
    print(line)

# %% [markdown]
# ## Norms, raw and centred
#
# Shifting queries and keys changes nothing in attention, but much in the norms. Both of the paper's
# ratios, over all heads: below about 1 is where its algorithm lives.

# %%
norms = [row["norms"]["adapted"] for row in rows]
fig, axes = plt.subplots(1, 2, figsize=(5.5, 2.4), layout="constrained")
for ax, raw, centred, label in (
    (axes[0], "gamma_ratio", "gamma_ratio_centred", "Gamma / sqrt(ln L)"),
    (axes[1], "score_ratio_raw", "score_ratio", "R / ln L"),
):
    x, y = (np.array([n[name] for n in norms]) for name in (raw, centred))
    ax.loglog(x, y, "o", markersize=3)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.loglog(ends, ends, "k-", linewidth=0.6)
    ax.set(xlabel=f"{label}, raw", ylabel="centred")
plt.show()

# %% [markdown]
# ## What each method reached
#
# Relative error of the gradients, largest over windows and arrays, by the method that was tried.
# The command climbs each ladder from its smallest rung and stops at the first that is within the
# tolerance.

# %%
methods = list(dict.fromkeys(tried["method"] for row in rows for tried in row["tried"]))
tries = [
    (t["method"], np.inf if t["error"] is None else t["error"])
    for row in rows
    for t in row["tried"]
]
errors = {m: [error for method, error in tries if method == m] for m in methods}
fig, ax = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
ax.boxplot(
    [np.clip(errors[m], 1e-3, 1e3) for m in methods], tick_labels=methods, orientation="horizontal"
)
ax.axvline(diagnosis["tolerance"], color="black", linestyle="--", linewidth=0.8)
ax.set(xscale="log", xlabel="relative error")
plt.show()

# %% [markdown]
# ## The mini-batch dial
#
# A gradient is noisy anyway: windows of text differ. An error below that noise costs nothing. For
# each head, the largest mini-batch whose noise still hides the error of its best method.

# %%
hidden = [
    row["dials"]["batch_at_error"] for row in rows if row["dials"]["batch_at_error"] is not None
]
{
    "heads whose error a single window hides": sum(b >= 1 for b in hidden),
    "of": len(hidden),
    "median": float(np.median(hidden)),
}
