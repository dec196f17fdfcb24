"""The theorems of "Computational Limits of Low-Rank Adaptation for Transformer Models" (arXiv
2406.03136), made to run.

    problem -> factor -> gradient -> certificate: a LoRAProblem and a method go into `gradient`, and
    the GradientResult that comes out knows what it is worth.

Symbols, used as printed in the paper. Row-vector convention: a token is a row and W acts on the
right.

    L, Lq, Lk        tokens, of the queries, of the keys
    X_Q, X_K, X_V    (L, d_model) inputs                  Q, K, V      (L, d) projections with the adapters in
    W*, A, B, s      frozen weight, adapter, alpha / r    beta         inverse temperature of the scores
    S = beta Q K^T   scores                               f            softmax of S, row by row
    Y, c = f V - Y   target, residual                     q = c V^T    (L, L)
    rho_j            <f_j, q_j>                           p            f o (q - rho 1^T), the gradient's kernel
    Gamma, R         max norm of Q and K, of S            g, k         degree, number of features
    P, D             polynomial for exp, its row sums     w, nu, mu    key weights and the centres that give them
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lora_limits import _moved

if TYPE_CHECKING:
    from lora_limits import hardness
    from lora_limits.estimate.intervals import Estimate
    from lora_limits.factors import (
        AdaptedMonomials,
        BlockTree,
        Nystrom,
        RandomFeatures,
        Skeleton,
        SparseLowRank,
        Svd,
    )
    from lora_limits.gradients.chain import Chain
    from lora_limits.gradients.choosing import choose
    from lora_limits.gradients.methods import Exact, Polynomial
    from lora_limits.gradients.sharded import sharded_gradient
    from lora_limits.gradients.solve import gradient, loss
    from lora_limits.gradients.streamed import streamed_gradient
    from lora_limits.method import GradientResult, Method
    from lora_limits.nn.attention import attention
    from lora_limits.nn.attention_fn import AttentionFn
    from lora_limits.norms import NormReport, norm_report
    from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem, batch_axes
    from lora_limits.rotary import rotary_angles
    from lora_limits.synthetic import random_problem

__version__ = "0.2.0"

# Where each public name lives. A module is imported when one of its names is first asked for, so
# that
# `lora-limits --help` does not wait for JAX. Type checkers read the imports above; a test holds the
# two together.
_HOMES = {
    "estimate.intervals": ("Estimate",),
    "factors": (
        "AdaptedMonomials",
        "BlockTree",
        "Nystrom",
        "RandomFeatures",
        "Skeleton",
        "SparseLowRank",
        "Svd",
    ),
    "gradients.chain": ("Chain",),
    "gradients.choosing": ("choose",),
    "gradients.methods": ("Exact", "Polynomial"),
    "gradients.sharded": ("sharded_gradient",),
    "gradients.solve": ("gradient", "loss"),
    "gradients.streamed": ("streamed_gradient",),
    "method": ("GradientResult", "Method"),
    "nn.attention": ("attention",),
    "nn.attention_fn": ("AttentionFn",),
    "norms": ("NormReport", "norm_report"),
    "problem": ("Adapter", "AttentionWeights", "LoRAProblem", "batch_axes"),
    "rotary": ("rotary_angles",),
    "synthetic": ("random_problem",),
}
_HOME = {name: f"lora_limits.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdaptedMonomials",
    "Adapter",
    "AttentionFn",
    "AttentionWeights",
    "BlockTree",
    "Chain",
    "Estimate",
    "Exact",
    "GradientResult",
    "LoRAProblem",
    "Method",
    "NormReport",
    "Nystrom",
    "Polynomial",
    "RandomFeatures",
    "Skeleton",
    "SparseLowRank",
    "Svd",
    "attention",
    "batch_axes",
    "choose",
    "gradient",
    "hardness",
    "loss",
    "norm_report",
    "random_problem",
    "rotary_angles",
    "sharded_gradient",
    "streamed_gradient",
]


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in __all__:  # a package
        return importlib.import_module(f"lora_limits.{name}")
    else:
        raise AttributeError(f"module 'lora_limits' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_moved.install()
