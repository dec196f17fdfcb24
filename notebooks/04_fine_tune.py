# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # From a norm to a decision
#
# [The checklist](../lora_limits/checklist.md), walked from its first step to its last on a small
# decoder of Llama's kind: its norms, what a polynomial would need, the error of a gradient beside
# the noise of a mini-batch, and a pilot that trains it twice and says go or no-go. On a model of
# your own the same is two commands:
#
#     lora-limits diagnose MODEL_DIR --text FILE
#     lora-limits pilot MODEL_DIR --text FILE

# %%
import math
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from flax import nnx

sys.path.append("..")  # experiments lies beside this folder, in the checkout

from experiments.training import pilots
from lora_limits.nn import per_layer
from lora_limits.pilot import picture, report
from lora_limits.pilot.course import Pilot
from lora_limits.pilot.settings import Settings

# %% [markdown]
# ## A model and a text
#
# Two layers of eight heads of width 8, with rotary positions and keys shared by two heads each,
# pretrained for a moment on the language reference, byte by byte. It is to learn code.

# %%
settings = Settings(length=256, batch=2, steps=12, seeds=2, rate=3e-3, method="polynomial 2")
folder = Path(tempfile.mkdtemp())
load = pilots.loader("made", folder, settings.lora, None, folder, 30)
task = pilots.task("made", settings.length, folder)
model = load(0)
print(f"{len(task.train.tokens)} windows to train on, {len(task.test.tokens)} held out")

# %% [markdown]
# ## Steps 1 to 3: norms, R / ln L, features
#
# Theorem 3.1 wants scores of o(ln L). A polynomial of degree g has binom(d + g, g) features, and
# must have fewer than there are tokens.

# %%
graphdef, params = nnx.split(model)
norms = jax.jit(lambda params, x: per_layer.norms(nnx.merge(graphdef, params), x))
for n, layer in enumerate(norms(params, task.test.tokens[:2])):
    gamma, score = layer.gamma_ratio.max(), layer.score_ratio.max()
    print(f"layer {n}: Gamma / sqrt(ln L) = {gamma:.2f}, R / ln L = {score:.2f}")
print("features:", {g: math.comb(8 + g, g) for g in (1, 2, 3, 4)}, "tokens:", settings.length)

# %% [markdown]
# ## Steps 4 to 7: the pilot
#
# Error of a layer's gradient against the noise of a mini-batch, then both sides from the same
# adapters, on the same batches, scored on held-out text under exact attention. The margin was set
# before: 0.01 nats a byte. Without `method` a layer takes an approximate one only where its error
# is at most half of the noise and it is faster; here every layer is told to.

# %%
asked = {"model": "a small decoder", **vars(settings)}
state = Pilot(load, task, settings, asked, folder / "pilot", lambda *_: None).run()
for n, layer in enumerate(state["choice"]["layers"]):
    error = layer["errors"]["polynomial 2"]
    print(f"layer {n}: error {error:.2f}, noise {layer['noise']:.2f}")
print("\n".join(report.lines(state, settings)))

# %%
fig, axes = plt.subplots(2, 2, figsize=(8, 5), layout="constrained")
picture.draw(axes.ravel(), state)
plt.show()

# %% [markdown]
# Ten lines and four panels, and a reason with the verdict. The experiment `pilot` has this model at
# more steps and lengths, and real models beside it.
