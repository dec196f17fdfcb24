"""The theorems of "Computational Limits of Low-Rank Adaptation for Transformer Models" (arXiv 2406.03136), made to run.

    problem -> factor -> gradient -> certificate: a LoRAProblem and a method go into `gradient`, and the GradientResult
    that comes out knows what it is worth.

Symbols, used as printed in the paper. Row-vector convention: a token is a row and W acts on the right.

    L, Lq, Lk        tokens, of the queries, of the keys
    X_Q, X_K, X_V    (L, d_model) inputs                  Q, K, V      (L, d) projections with the adapters in
    W*, A, B, s      frozen weight, adapter, alpha / r    beta         inverse temperature of the scores
    S = beta Q K^T   scores                               f            softmax of S, row by row
    Y, c = f V - Y   target, residual                     q = c V^T    (L, L)
    rho_j            <f_j, q_j>                           p            f o (q - rho 1^T), the gradient's kernel
    Gamma, R         max norm of Q and K, of S            g, k         degree, number of features
    P, D             polynomial for exp, its row sums     w, nu, mu    key weights and the centres that give them
"""

from lora_limits import hardness
from lora_limits.attention import attention
from lora_limits.chain import Chain
from lora_limits.choose import choose
from lora_limits.estimate import Estimate
from lora_limits.factors import AdaptedMonomials, Nystrom, RandomFeatures, Skeleton, SparseLowRank, Svd
from lora_limits.gradient import Exact, GradientResult, Method, Polynomial, gradient, loss
from lora_limits.norms import NormReport, norm_report
from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem
from lora_limits.sample import random_problem
from lora_limits.sharded import sharded_gradient

__version__ = "0.1.0"

__all__ = [
    "AdaptedMonomials",
    "Adapter",
    "AttentionWeights",
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
    "choose",
    "gradient",
    "hardness",
    "loss",
    "norm_report",
    "random_problem",
    "sharded_gradient",
]
