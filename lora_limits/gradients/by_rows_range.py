"""How much one query can be to blame for: a range of its share in the error of a gradient by rows.

For problems with a causal order, rotations or masks the certificate of plain ones (certificate/) does
not hold: a prefix of the keys has a centre of its own, and a rotated key is no linear function of
its inputs. Here nothing is centred, and every key counts by its lengths. For one query i, with x, y, v
the rows that the sweeps work on (by_rows.py), w the weights, s_j = x_i . y_j, and sums over the
keys that i sees:

    f_j  = w_j e^{s_j} / Z      exact        p_j  = f_j  c . (v_j - E_f v)
    f~_j = w_j h_j / D          the sweeps'  p~_j = f~_j c~ . (v_j - m)      m  = sum_j f~_j v_j
    f'_j = w_j h'_j / D         its kernel   p'_j = f'_j c~ . (v_j - m)      c~ = m + v_mean - Y_i

h = h' = e^s for the keys of i's own block, and P and P' (Taylor, so P' is P of one degree less) beyond it.
The shares are (estimate/masked_rows.py), sqrt(beta) and the scale apart,

    query   X_i (x) R_i^T sum_j (p - p')_j y_j
    key     sum_j X_j (x) R_j^T ((p - p')_j x_i + (p - p~)_j nu), (p - p') less its sum in shares
    value   sum_j X_j (x) (f_j c - f~_j c~)

1. What P leaves out. eps_j = w_j (e^s - P) / D beyond the block and 0 in it, eps' the same for P'.
   With R >= |x_i| max_j |y_j| and phi of series.remainder_factor, |e^s - P'| <= phi_g(R) |s|^g and
   |e^s - P| <= phi_{g+1}(R) |s|^{g+1}, so

       |eps'_j| <= phi_g(R) w_j |s_j|^g / D,    |eps_j| <= kappa times that,  kappa = R phi_{g+1} / phi_g

   and for a length z_j >= 0, T'[z] := sum_j |eps'_j| z_j is bounded by the moment of |s|^g: with t
   the largest even number <= g, |s|^g <= s^t (|x_i||y_j|)^{g-t}, and a sum of w_j s_j^t z_j over
   the keys beyond the block is read from features of degree t (`_moments`). T[z] <= kappa T'[z].
   By Cauchy-Schwarz T[z z'] <= sqrt(T[z^2] T[z'^2]): roots of moments of squares are kept.

2. Differences. a = sum_j eps_j, so Z = D (1 + a) and (1 + a) f = f~ + eps = f' + eps' (each on all
   keys). With |a| <= alpha := T[1], and q_j := c~ . (v_j - m),

       E_f v - m = eps[v - m] / (1 + a) =: delta,      c = c~ + delta                   (eps[z] = sum_j eps_j z_j)
       p - p' = eps' q + f (eps[v - m] . (v - E_f v) - eps[q]) - a p
       p - p~ = the same with eps q in place of eps' q
       f - f~ = eps - a f,       f c - f~ c~ = f delta + (f - f~) c~

   [(1 + a) p = (f' + eps') (q - c~ . delta + delta . (v - E_f v)), and (1 + a) delta = eps[v - m].]

3. Lengths. f is a distribution: sum_j f_j z_j <= max z, sum_j f_j |v_j - E_f v| <= V = max |v|. So

       |delta| <= min(T[|v - m|] / (1 - alpha), V + |m|)       (the first where alpha < 1)
       sum_j |p - p'|_j z_j <= |c~| T'[|v - m| z] + max z ((|c~| + V) T[|v - m|] + alpha |c| V)
       sum_j |f - f~|_j z_j <= T[z] + alpha max z

   and of each share the lengths of its two sides (`shares`): of a sum of outer products l_j (x) r_j
   no entry is above sum_j |l_j|_inf |r_j|_inf; a rotation keeps the lengths of the pairs that it
   turns, so that no entry of R^T y is above the longest pair of y.

Nothing is assumed of the problem; D > 0 must be certain (by_rows_rounding.py). Everything is for
the rows as computed: what rounding does is bounded there. Sums here are of terms >= 0, so their own
rounding is relative, and OUTWARD makes up for it; what underflows in them is added (`lost`).
The bounds are loose: lengths in place of coordinates cost about sqrt(d d_value), and absolute
values see no cancellation between keys or queries. Sampling (confidence.py) makes up for the second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate.bound import arrays_of
from lora_limits.certificate.rounding import column_lengths, gamma, row_lengths, tiny
from lora_limits.certificate.row_bounds import even_order
from lora_limits.gradients import by_rows
from lora_limits.heads import block_sums, polynomial_full
from lora_limits.heads.tokens import tokens_of
from lora_limits.linalg import dot
from lora_limits.polynomial import series
from lora_limits.problem import LoRAProblem, inputs, scalars

FARTHEST = (
    100.0  # the largest R for which anything is promised: e^R, and e^-R, are far from the ends
)


class Keys(NamedTuple):
    """Lengths z of the keys that some query sees, by name; of each adapter's two arrays, its left side
    for key and value, its right side for query.
    """

    longest: dict[str, Float[Array, ""]]
    mean: dict[str, Float[Array, ""]]  # by the keys' weights
    squares: Float[Array, "names lk"]  # (z / longest)^2, in order; 0 for other keys
    y: Float[Array, ""]  # max |y_j|
    relative: Float[Array, " lk"]  # |y_j| over it


class Query(NamedTuple):
    """Of every query: sums over the keys beyond its own block, and what follows from them."""

    x: Float[Array, " lq"]  # |x_i|
    reach: Float[Array, " lq"]  # R
    flat: Float[Array, " lq"]  # sum_j w_j
    roots: dict[str, Float[Array, " lq"]]  # sqrt(T'[z^2] D)


def pair_lengths(problem: LoRAProblem, x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """The longest pair of coordinates that a rotation turns, or coordinate that it leaves alone."""
    half = 0 if problem.rotations is None else problem.rotations.query.shape[1]
    first, second = x[:, :half], x[:, half : 2 * half]
    turned = jnp.sqrt(first**2 + second**2 + 2 * tiny(x))
    return jnp.concatenate([turned, jnp.abs(x[:, 2 * half :])], 1).max(1)


def adapted_lengths(problem: LoRAProblem, name: str) -> Float[Array, " n"]:
    """Of every token, the largest entry of its row of X B, rounding of the product included."""
    x, b = inputs(problem)[name], problem.adapters[name].b
    rounded = gamma(problem, b.shape[0] + 4) * row_lengths(x) * column_lengths(b).max()
    return jnp.abs(dot(x, b)).max(1) + rounded


def keys_of(problem: LoRAProblem, rows: by_rows.Rows) -> Keys:
    """Lengths that the shares of the problem's adapters ask for. O(L (d + d_value + d_model r))."""
    y, v, seen = rows.y.T, rows.v.T, rows.centres.w > 0
    lengths = {"one": jnp.ones_like(rows.centres.w), "v": row_lengths(v)}
    if "query" in problem.adapters:
        lengths |= {"query.a": pair_lengths(problem, y), "query.b": row_lengths(y)}
    for name in ("key", "value"):
        if name in problem.adapters:
            lengths[f"{name}.a"] = adapted_lengths(problem, name)
            lengths[f"{name}.b"] = jnp.abs(inputs(problem)[name]).max(1)
    lengths = {name: jnp.where(seen, z, 0) for name, z in lengths.items()}
    longest = {name: z.max() for name, z in lengths.items()}
    weights = rows.centres.w / jnp.maximum(rows.centres.w.sum(), 1)
    mean = {name: dot(weights, z) for name, z in lengths.items()}
    squares = jnp.stack([_over(z, longest[name]) ** 2 for name, z in lengths.items()])
    of_y = jnp.where(seen, row_lengths(y), 0)
    return Keys(longest, mean, squares, of_y.max(), _over(of_y, of_y.max()))


def _over(z: Float[Array, " n"], most: Float[Array, ""]) -> Float[Array, " n"]:
    """Lengths over the longest; 0 where all are."""
    return z / jnp.where(most > 0, most, 1)


def _beyond(
    problem: LoRAProblem, method: Any, rows: by_rows.Rows, power: int, z: Float[Array, "c lk"]
) -> Float[Array, "c lq"]:
    """sum_j w_j s_ij^power z_j over the keys that a query sees beyond its own block."""
    x, y, w = rows.x, rows.y, rows.centres.w
    c = jnp.zeros(power + 1, x.dtype).at[power].set(1)
    rule = by_rows.rule_of(problem, method)
    if not by_rows.in_blocks(problem):
        return polynomial_full.sums(rule.block, c, x, y, w, z)
    return block_sums.beyond(rule, c, x, y, w, z, tokens_of(problem).key_document)


def queries_of(
    problem: LoRAProblem,
    method: Any,
    rows: by_rows.Rows,
    keys: Keys,
    summed: float,
    lost: Float[Array, ""],
) -> Query:
    """The moments of step 1. summed: rounding of a sum over keys and features, over the sum of
    absolute values; lost: what operations that underflow take from it in all.

    O(L k_t columns) time, k_t features of the even degree t, at most 8 columns.
    """
    degree = method.degree
    t = even_order(degree)
    x = column_lengths(rows.x)[0]
    # no score is above it, whatever the rounding of the lengths
    reach = x * keys.y * (1 + 64 * float(jnp.finfo(x.dtype).eps))
    flat = _beyond(problem, method, rows, 0, keys.squares)
    flat = jnp.where(flat > 0, flat * (1 + summed) + lost, 0)
    z = keys.squares * keys.relative[None] ** (degree - t)
    # rounded by `summed` of sum_j w_j (|x||y_j|)^t z_j
    power = (reach**t)[None]
    even = _beyond(problem, method, rows, t, z) + summed * power * flat + lost
    even = jnp.clip(even, 0, power * flat)
    moments = even * (reach ** (degree - t))[None]
    near = jnp.minimum(reach, FARTHEST)
    size = series.remainder_factor(degree, near)
    roots = jnp.sqrt(size[None] * moments)
    by_name = {name: z * root for (name, z), root in zip(keys.longest.items(), roots, strict=True)}
    # the first of the lengths is that of 1
    return Query(x, reach, flat[0], by_name)


def shares(
    problem: LoRAProblem,
    method: Any,
    rows: by_rows.Rows,
    keys: Keys,
    query: Query,
    total: Float[Array, " lq"],
    c: Float[Array, " lq"],
    m: Float[Array, " lq"],
) -> Float[Array, "arrays lq"]:
    """r_i, by `arrays_of`, before the scale: at least every entry of the share of query i.

    total: D_i, from below. c, m: |c~_i| and |m_i|, from above.
    """
    near = jnp.minimum(query.reach, FARTHEST)
    low, high = (series.remainder_factor(method.degree + n, near) for n in (0, 1))
    # sqrt(T'[z^2]), and over it sqrt(T[z^2])
    prime = {name: root / jnp.sqrt(total) for name, root in query.roots.items()}
    kappa = near * high / low
    root = jnp.sqrt(kappa)
    one, longest = root * prime["one"], keys.longest
    alpha = one**2
    # sqrt(T'[|v - m|^2])
    spread = prime["v"] + m * prime["one"]
    moved = one * root * spread
    inside = jnp.where(alpha < 1, moved / jnp.where(alpha < 1, 1 - alpha, 1), jnp.inf)
    delta = jnp.minimum(inside, longest["v"] + m)
    rest = (c + longest["v"]) * moved + alpha * (c + delta) * longest["v"]

    def kernel(name: str) -> Float[Array, " lq"]:
        """sum_j |p - p'|_j z_j."""
        return c * spread * prime[name] + longest[name] * rest

    def weights(name: str) -> Float[Array, " lq"]:
        """sum_j |p - p~|_j z_j."""
        return kappa * c * spread * prime[name] + longest[name] * rest

    def value(name: str) -> Float[Array, " lq"]:
        """sum_j |f c - f~ c~|_j z_j, both the lengths of rows."""
        return longest[name] * delta + c * (one * root * prime[name] + alpha * longest[name])

    beta = jnp.sqrt(scalars(problem)[1])
    nu = rows.centres.nu[None]
    x = rows.x.T
    out = {}
    for name, half in arrays_of(problem):
        array = f"{name}.{half}"
        # rows of A turn right sides into entries of dB
        right = 1.0 if half == "a" else row_lengths(problem.adapters[name].a).max()
        if name == "query":
            inputs_i = problem.x_query
            left = jnp.abs(inputs_i).max(1) if half == "b" else adapted_lengths(problem, name)
            out[array] = beta * left * right * kernel(array)
        elif name == "key":
            measure = row_lengths if half == "b" else lambda z: pair_lengths(problem, z)
            # all of (p - p') in shares
            held = kernel(array) + keys.mean[array] * c * spread * prime["one"]
            out[array] = beta * right * (held * measure(x) + weights(array) * measure(nu)[0])
        else:
            out[array] = right * value(array)
    return jnp.stack(list(out.values()))
