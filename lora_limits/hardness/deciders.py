"""From a gradient oracle to a yes or no: Theorem 4.1 run backwards, in two ways.

Notation as in gadgets.py. Path (the paper's own reduction, Lemma E.1 and its Appendix E; sigma = 0,
c = ln(8)/2): r = d + w, Y = 0, W*_Q = 0, s = 1, and

    X_Q = [Q 0]   B = [I_r; 0]   A = [lambda I_r, 0]   X_K = X_V = [K v]   W*_K = diag(1_r, 0)   W*_V = e_last

so that Q B A K^T beta = lambda S. Let F(lambda) = 2 l = || softmax(lambda S) v ||^2 over all L
rows. Then

    F(0) = L (n_b / L)^2                                      uniform attention
    F(1) - F(0) = int_0^1 2 tr(dl/dA[:, :r]) dlambda           quadrature.py
    sum_i tau_i^2 = F(1) - (L - n_a) (n_b / L)^2               the dead queries stay uniform

    YES: >= 1/4        NO: <= 1/8        threshold 3/16

An error eps of every entry of the gradient moves the trace by r eps, so eps < (1/16 - quadrature
error) / (2 r) is tolerated, whatever its signs. O(log^2 L) calls.

Readout (one entry of one gradient; c = ln(100)/2). Rank 1, Y = 0, s = 1, freshly initialised:
B = 0, A = e_last^T, and W* carries the instance,

    X_Q = [Q, Gamma on live rows]   W*_Q = diag(1_r, 0)   X_K = X_V = [K, Gamma v]   W*_K = I   W*_V = e_last / Gamma

Then q = tau v^T and rho = tau^2, so p v = f o (tau_i v - tau_i^2) . v = tau_i^2 (1 - tau_i), and

    dl/dB[last] = beta Gamma^2 sum_i tau_i^2 (1 - tau_i) = beta0 G,       beta0 = beta Gamma^2

tau^2 (1 - tau) = o^2 / (1 + o)^3 vanishes when tau does, but also when tau = 1, so the pads are
raised: each step of sigma = 0, 1, 2, ... divides every o by e. If some o_i >= 1 at sigma = 0, then
either o_i < e now or o_i lies in [1.230, 1.230 e] later; so

    YES: G >= 1/8 at some sigma        NO: G <= sum tau_i^2 <= 1/100 at all        threshold 27/400

o_i <= n_b e^(beta0 (top - level)) ends the scan. O(log L) calls, and an error eps < 0.0575 beta0 in
that one entry is tolerated: a constant for Hamming with Delta = Theta(log n), where Theorem 4.1 as
printed has eps = O(log^-4 L).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_limits.hardness.gadgets import (
    Gadget,
    inverse_noise,
    max_norm,
    pad_entry,
    pad_score,
    score_range,
    token_rows,
)
from lora_limits.hardness.quadrature import Oracle, error_bound, nodes_needed, path_integral
from lora_limits.problem import Adapter, AttentionWeights, LoRAProblem

# Of both ways: c, where YES and NO are parted, and how far they stay from there.
PATH_SLACK = math.log(8) / 2
PATH_THRESHOLD = 3 / 16
PATH_GAP = 1 / 16
QUADRATURE_SHARE = 1 / 512  # of the path's gap, the rest of which is left to the oracle
READOUT_SLACK = math.log(100) / 2
READOUT_THRESHOLD = (1 / 8 + 1 / 100) / 2
READOUT_GAP = (1 / 8 - 1 / 100) / 2


@dataclasses.dataclass(frozen=True)
class Decision:
    """The answer and what it stands on; bool(decision) is the answer.

    calls: oracle calls made. tokens: L of each. gamma: max norm of all queries and keys of those
    calls; score_bound: R. margin: signed distance from the threshold in units of the oracle's
    error: positive for YES, and no error below |margin| in every entry could have changed it. NaN
    or -inf if the oracle returned nothing finite. tolerance: the error guaranteed to be harmless
    when the instance keeps its promise; then |margin| >= tolerance for an exact oracle (up to
    rounding, about 1e-12).
    """

    answer: bool
    calls: int
    tokens: int
    gamma: float
    score_bound: float
    margin: float
    tolerance: float

    def __bool__(self) -> bool:
        return self.answer

    @property
    def score_ratio(self) -> float:
        """R / ln L, the order parameter: hard at Theta(1), easy at o(1); 0 without a call."""
        return self.score_bound / math.log(self.tokens) if self.tokens > 1 else 0.0


def _assemble(
    x_query: Float[np.ndarray, "l d_model"],
    x_key: Float[np.ndarray, "l d_model"],
    weights: AttentionWeights,
    adapter: Adapter,
    beta: float,
) -> LoRAProblem:
    """The problem with Y = 0, s = 1 and an adapter on the queries, in JAX's float64."""

    def array(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x, jnp.float64)

    xk = array(x_key)
    return LoRAProblem(
        array(x_query),
        xk,
        xk,
        array(np.zeros((len(x_query), 1))),
        weights=jax.tree.map(array, weights),
        adapters={"query": jax.tree.map(array, adapter)},
        scale=np.float64(1.0),
        beta=np.float64(beta),
    )


def path_problem(gadget: Gadget, beta0: float, lam: float) -> LoRAProblem:
    """The problem at A = [lam I, 0]; rank d + w, width d + w + 1. Call in jax.enable_x64(True)."""
    # The last coordinate carries v, which W*_K cuts off and W*_V picks.
    queries, keys, v = token_rows(gadget, beta0, sigma=0.0)
    r = queries.shape[1]
    eye = np.eye(r + 1)
    last = np.eye(r + 1)[:, -1:]
    x_query = np.pad(queries, ((0, 0), (0, 1)))
    x_key = np.concatenate([keys, v[:, None]], 1)
    weights = AttentionWeights(query=np.zeros((r + 1, r + 1)), key=eye - last @ last.T, value=last)
    adapter = Adapter(lam * eye[:r], eye[:, :r])
    return _assemble(x_query, x_key, weights, adapter, 1 / gadget.width)


def readout_problem(gadget: Gadget, beta0: float, sigma: float) -> LoRAProblem:
    """The problem at B = 0, A = e_last^T; rank 1, width d + w + 1. Call in jax.enable_x64(True)."""
    queries, keys, v = token_rows(gadget, beta0, sigma)
    size = max_norm(gadget, beta0)
    width = queries.shape[1] + 1
    # Dead queries have 0 in the last coordinate: they are not in the sum that dl/dB[last] is.
    live = (np.arange(len(queries)) < len(gadget.queries)).astype(np.float64)
    x_query = np.concatenate([queries, size * live[:, None]], 1)
    x_key = np.concatenate([keys, size * v[:, None]], 1)
    eye = np.eye(width)
    last = np.eye(width)[:, -1:]
    weights = AttentionWeights(query=eye - last @ last.T, key=eye, value=last / size)
    adapter = Adapter(last.T, np.zeros((width, 1)))
    return _assemble(x_query, x_key, weights, adapter, 1 / gadget.width)


def _report(
    gadget: Gadget, beta0: float, last_sigma: float, answer, calls, margin, tolerance
) -> Decision:
    """The decision with the norms that its calls had, sigma going from 0 to last_sigma."""
    # Pads are linear in sigma, so the ends are the largest.
    ends = (0.0, last_sigma)
    gamma = max(max_norm(gadget, beta0), *(abs(pad_entry(gadget, beta0, s)) for s in ends))
    bound = max(beta0 * gadget.reach, *(abs(pad_score(gadget, beta0, s)) for s in ends))
    return Decision(bool(answer), calls, gadget.tokens, gamma, bound, margin, tolerance)


def decide_by_path(
    gadget: Gadget, oracle: Oracle, *, nodes: int | None = None, beta0: float | None = None
) -> Decision:
    """Integrates F' along A = [lam I, 0] and compares sum_i tau_i^2 with 3/16.

    nodes: calls made; by default as many as certify the integral to 1/512. A smaller count works
    long before it is certified; the tolerance reported is then 0. beta0: the gadget's own need by
    default; below it nothing is promised.
    """
    beta0 = inverse_noise(gadget, PATH_SLACK) if beta0 is None else beta0
    na = len(gadget.queries)
    nb = len(gadget.keys)
    length = gadget.tokens
    spread = score_range(gadget, beta0)
    nodes = nodes_needed(na, spread, QUADRATURE_SHARE) if nodes is None else nodes
    change = path_integral(lambda lam: path_problem(gadget, beta0, lam), oracle, nodes)
    # F(0), plus F(1) - F(0), less what the dead queries keep: sum_i tau_i^2 of the live ones
    mean = nb / length
    squares = length * mean**2 + change - (length - na) * mean**2
    # An error of every entry of the gradient moves 2 tr(dl/dA[:, :r]) by 2 r times it.
    gain = 2.0 * (gadget.width + gadget.pad_width)
    tolerance = max(0.0, PATH_GAP - error_bound(na, spread, nodes)) / gain
    margin = (squares - PATH_THRESHOLD) / gain
    return _report(gadget, beta0, 0.0, margin > 0, nodes, margin, tolerance)


def scan_length(gadget: Gadget, beta0: float) -> int:
    """How often the pads must be raised by 1 before every row's odds are certainly below e."""
    return max(1, math.ceil(beta0 * (gadget.top - gadget.level) + math.log(len(gadget.keys))))


def decide_by_readout(gadget: Gadget, oracle: Oracle, *, beta0: float | None = None) -> Decision:
    """Reads dl/dB[last] at sigma = 0, 1, ... and says YES at the first reading above 27/400 beta0.

    A NO makes scan_length calls, a YES often one. beta0: the gadget's own need by default; below
    it nothing is promised.
    """
    beta0 = inverse_noise(gadget, READOUT_SLACK) if beta0 is None else beta0
    threshold = beta0 * READOUT_THRESHOLD
    best = -math.inf
    calls = 0
    for sigma in range(scan_length(gadget, beta0)):
        with jax.enable_x64(True):
            grad = oracle(readout_problem(gadget, beta0, sigma))["query"].b
        calls += 1
        # max() keeps `best` when the reading is NaN: what is not a number decides nothing.
        best = max(best, float(np.asarray(grad)[-1, 0]))
        if best > threshold:
            break
    margin = best - threshold
    return _report(gadget, beta0, calls - 1.0, best > threshold, calls, margin, beta0 * READOUT_GAP)


DECIDERS = {"readout": decide_by_readout, "path": decide_by_path}
