"""Certified max-norm bounds on the polynomial gradients, from row moments that the same features
provide.

Notation, for one query i: f~_ij = w_j P(s_ij) / D_i, with P' in the gradient; a = sum_j eps_j with
eps_j = w_j (e^s - P)(s_ij) / D_i and eps'_j = w_j (e^s - P')(s_ij) / D_i, so that Z_i = sum_j w_j
e^s = D_i (1 + a). m(z) = sum_j f~_j z_j, v the centred values, v^o = v - m(v), q^o_j = c~ . v^o_j
with c~ the computed residual, k any column. The computed row is G~ = (1/D) sum_j w_j P'(s_ij) q^o_j
k_j, the exact one G = Cov_f(c . v, k), and exactly

    (1 + a) G - G~ = eps'[q^o k] - eps[q^o] E_f[k] + eps[v^o] . Cov_f(v, k).                                   (*)

[c = c~ + eps[v^o]/(1+a), E_f v = m(v) + eps[v^o]/(1+a), and E_f[v^o] = eps[v^o]/(1+a); expand and
collect.]

An envelope |e^s - P'| <= h0 + h1 |s|^g gives a measure eta' >= |eps'|, and eta likewise for P with
|s|^{g+1} <= R_i |s|^g, R_i >= max_j |s_ij|. With t the largest even number <= g, |s|^g <= s^t
(|x||y|)^{g-t}: even powers of s are themselves features, so eta'[z] for a column z >= 0 is read
from the degree-t features. Then, by Cauchy-Schwarz in each measure, with Z = N3 v, W = N3^-T v for
any invertible N3, every term of (*) is bounded by products of eta[1], eta[|Z|^2], eta[|W|^2],
eta[k^2] and of E_f[z] <= (1/Z_i) sum_j w_j (P_{t-1} + phi_t(R) s^t) z_j. Centred keys give Z_i >=
sum_j w_j (Jensen), so only D_i > 0 is needed, and when it cannot be certified the bound is infinite
and the result says so.

Rounding is bounded by the probabilistic analysis of Higham and Mary (SIAM J. Sci. Comput. 41,
2019): a sum of n
rounded terms errs by at most LAMBDA sqrt(n) u times the sum of absolute values, and independent
errors of different queries add in squares, with failure probability below 2 n exp(-LAMBDA^2 / 2) <
1e-10 under its model of rounding errors with mean zero. The absolute sums come from radial moments
sum_j w_j |y_j|^m z_j. The worst case over all roundings would be sqrt(n L) times larger and say
nothing in float32; the truncation part needs no model. Rounding of the keys is shared by all
queries, so squares are optimistic for it: the slack in LAMBDA covers that while sqrt(L) is small
beside LAMBDA n, tested to L = 2048 in float32 and not known to hold near 1e5 where rounding is
systematic. Centred columns can be made of cancellation, so their own rounding, which is in
proportion to |x||W| and not to what is left, is counted apart (`Floors`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.certificate.columns import LAMBDA, Columns, Floors, frobenius, names, unit_roundoff
from lora_limits.certificate.row_bounds import Rows, Setup, settle
from lora_limits.coordinates.frame import Frame
from lora_limits.linalg import dot, down
from lora_limits.problem import Adapter, LoRAProblem, scalars


class Sums(NamedTuple):
    """Per-array accumulators of the bound, summed over queries; see `add_queries` and `bounds` for
    their use.
    """

    parts: dict[str, tuple[jax.Array, ...]]
    certain: jax.Array


def zero_sums(problem: LoRAProblem) -> Sums:
    """The empty sums, of the shapes `add_queries` adds to."""
    dtype = problem.dtype
    out = {}
    for name, adapter in problem.adapters.items():
        r, d = adapter.a.shape
        dm = adapter.b.shape[0]
        for half, n, m in (("a", r, d), ("b", dm, r)):
            shapes = {
                "query": ((n,), (n,), ()),
                "key": ((m,), (m,)),
                "value.a": ((m,), (m,), (n,), (n,), (), (n, m)),
                "value.b": ((m,), (m,), (), (), (), (), (m,), (m,), (m,)),
            }[f"value.{half}" if name == "value" else name]
            out[f"{name}.{half}"] = tuple(jnp.zeros(s, dtype) for s in shapes)
    return Sums(out, jnp.asarray(jnp.inf, dtype))


class Block(NamedTuple):
    """What one block of n queries hands to the bound; token axis last except in x_in."""

    x_in: jax.Array  # (n, d_model) inputs
    u: jax.Array  # (r, n) X_Q B
    q: jax.Array | None  # (d, n) centred queries, original coordinates; for key adapters
    dq: jax.Array | None  # (d, n) computed gradient rows
    c: jax.Array  # (d_value, n) residual
    m: jax.Array  # (d_value, n) m(v), centred
    m_xb: jax.Array | None  # (r, n) mean of X_V B under f~
    scale_y: jax.Array  # (1, n) |Y_i| + |v_mean|
    d_score: jax.Array  # (1, n) rounding of the scores
    d_query: jax.Array  # (1, n) rounding of the queries
    length: jax.Array  # (1, n) of the inputs, centred, and of their centre
    live: jax.Array  # (1, n) 1 on tokens not seen before


class Terms(NamedTuple):
    """Row quantities shared by the adapters, (1, n): each bounds one factor of (*)."""

    cn: jax.Array  # |N3^-T c~|
    z: jax.Array  # >= sqrt(eta[|Z^o|^2])
    z_prime: jax.Array  # the same under eta'
    dc: jax.Array  # >= |N3^-T eps[v^o]|
    root1: jax.Array  # sqrt(eta[1])
    fz: jax.Array  # >= sqrt(E_f[|Z|^2])
    rounding: jax.Array  # rounding of a row of G~ over sqrt(absolute sum of k^2)
    moved: jax.Array  # the same for rounded scores, over sqrt(E_f[k^2])
    flat: jax.Array  # >= sum_j |w_j P'(s_ij) q^o_j| / D_i: the same for rounding of k itself


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(down(x**2))


def _terms(gamma: float, cols: Columns, floors: Floors, b: Block, r: Rows) -> Terms:
    cn = _norm(dot(cols.n3_inverse, b.c))
    mz = _norm(dot(cols.n3, b.m))
    mw = _norm(dot(cols.n3_inverse, b.m))
    root1 = r.eta[:1]
    fz = r.mean[1:2]
    sz = r.size[1:2]
    s1 = r.size[:1]
    z = r.eta[1:2] + mz * root1
    z_prime = r.eta_prime[1:2] + mz * r.eta_prime[:1]
    dc = root1 * (r.eta[2:3] + mw * root1)
    inverse = frobenius(cols.n3_inverse)
    rounded_c = gamma * inverse * (inverse * s1 * sz + _norm(b.m) + b.scale_y)
    rounded_c = rounded_c + inverse * (floors.value * s1**2 + floors.v_mean)
    spread = sz + mz * s1
    rounding = 2 * gamma * cn * spread + rounded_c * spread + _norm(b.c) * floors.value * s1
    return Terms(
        *settle(cn, z, z_prime, dc, root1, fz, rounding, 6 * b.d_score * cn * fz, cn * spread * s1)
    )


def add_queries(
    problem: LoRAProblem,
    setup: Setup,
    cols: Columns,
    frame: Frame,
    floors: Floors,
    sums: Sums,
    b: Block,
    r: Rows,
) -> Sums:
    """Adds the error bounds of a block of queries: one Cauchy-Schwarz per term of (*), rounding in
    squares.
    """
    at = {name: slice(i, i + 1) for i, name in enumerate(names(problem))}
    t = _terms(setup.gamma, cols, floors, b, r)
    out = dict(sums.parts)

    def add(name, *terms):
        # a query with c = 0 and no certified normaliser gives 0 * inf: not certified
        out[name] = tuple(
            o + jnp.where(jnp.isnan(v), jnp.inf, v) for o, v in zip(out[name], terms, strict=True)
        )

    def second(name):  # the two terms of (*) in eps
        return t.cn * t.z * t.root1 * r.centre[at[name]] + t.dc * t.fz * r.mean[at[name]]

    def rounded(name):
        row = (
            t.rounding * r.size[at[name]]
            + t.moved * r.mean[at[name]]
            + t.flat * floors.columns.get(name, 0.0)
        )
        return jnp.maximum(row, floors.mixing * rounded("query.a")) if name == "query.b" else row

    if b.dq is not None:
        _add_query(problem, setup, cols, add, t, b, r, at, second, rounded)
    if b.q is not None:
        a = problem.adapters["key"].a
        for name, x, nu in (("key.a", b.q, frame.nu), ("key.b", dot(a, b.q), dot(a, frame.nu))):
            rest = second(name) + t.root1**2 * (t.cn + r.slack * t.dc) * t.fz * r.mean[at[name]]
            prime = rest + t.cn * t.z_prime * r.eta_prime[at[name]]
            plain = rest + t.cn * t.z * r.eta[at[name]]
            x = jnp.abs(x)
            nu = jnp.abs(nu)
            truncation = dot(x, (b.live * prime)[0]) + nu * (b.live * plain).sum()
            moved = b.d_query
            size = x + nu[:, None]
            if name == "key.b":  # dK A^T from independent errors in dK
                moved = moved * frobenius(a)
                size = jnp.maximum(
                    size, jnp.sqrt(dot(a**2, (jnp.abs(b.q) + jnp.abs(frame.nu)[:, None]) ** 2))
                )
            squares = dot(size**2, (b.live * rounded(name) ** 2)[0])
            squares = squares + (b.live * (moved * t.cn * t.fz * r.mean[at[name]]) ** 2).sum()
            add(name, truncation, squares)
    if b.m_xb is not None:
        _add_value(problem, setup, cols, frame, floors, add, t, b, r, at)
    certain = jnp.where(b.live > 0, jnp.where(jnp.isnan(r.certain), -jnp.inf, r.certain), jnp.inf)
    return Sums(out, jnp.minimum(sums.certain, certain.min()))


def _add_query(
    problem, setup, cols: Columns, add, t: Terms, b: Block, r: Rows, at, second, rounded
) -> None:
    """G - G~ = ((*) - a G~) / (1 + a), row by row, times |u_i|: u = X_Q B, k = K for A; u = X_Q, k
    = K A^T for B.

    The second index of G~ is shared like that of the columns: |G~_ib| <= sigma_b max_b |G~_ib| /
    sigma_b.
    """
    adapter = problem.adapters["query"]
    beta = scalars(problem)[1]
    weight = b.live * r.slack
    unit = unit_roundoff(problem)
    assert b.dq is not None
    d_g = (
        unit
        * b.dq.shape[0] ** 0.5
        * frobenius(adapter.a)
        * _norm(b.dq)
        / cols.sigma["query.b"].min()
    )
    d_u = unit * b.x_in.shape[1] ** 0.5 * frobenius(adapter.b) * b.length
    for name, u, g, on_g, on_u in (
        ("query.a", b.u, b.dq, 0.0, d_u),
        ("query.b", b.x_in.T, dot(adapter.a, b.dq), d_g, 0.0),
    ):
        g = (jnp.abs(g) / cols.sigma[name][:, None]).max(0, keepdims=True)
        row = weight * (
            beta * (t.cn * t.z_prime * r.eta_prime[at[name]] + second(name)) + t.root1**2 * g
        )
        squares = (weight * beta * rounded(name)) ** 2 + b.live * ((setup.gamma * g) ** 2 + on_g**2)
        add(name, dot(jnp.abs(u), row[0]), dot(u**2, squares[0]), (b.live * (on_u * g) ** 2).sum())


def _add_value(
    problem, setup, cols, frame, floors: Floors, add, t: Terms, b: Block, r: Rows, at
) -> None:
    """E_f[x] c - m(x) c~ = (Dm) c~ + m Dc + Dm Dc with Dm = eps[x - m(x)] / (1 + a) = eps[x] - a
    E_f[x], Dc so of v.

    |Dm| <= b (sqrt(eta1 eta[x^2]) + eta1 |m(x)|), the first part shared by the entries of x, the
    second their own; or sqrt(eta1 eta[x^2]) + eta1 sqrt(E_f[x^2]), all shared, which is less where
    b is large.
    """
    gamma = setup.gamma
    live = b.live
    a = problem.adapters["value"].a
    assert b.m_xb is not None

    def moved(name):  # |Dm| over the scale of x: the shared part, the factor of |m(x)|, all
        spread = t.root1 * r.eta[at[name]]
        first = r.slack * (spread + r.mass * r.tilt[at[name]])
        second = spread + r.mass * r.mean[at[name]]
        less = first < second
        return (
            jnp.where(less, r.slack * spread, second),
            jnp.where(less, live * r.slack * r.mass, 0),
            jnp.where(less, first, second),
        )

    def rounded(name):
        row = gamma * r.size[:1] * r.size[at[name]] + 2 * b.d_score * r.mean[at[name]]
        return row + r.size[:1] ** 2 * floors.columns.get(name, 0.0)

    unit = unit_roundoff(problem)
    d_c = 4 * unit * (b.scale_y + _norm(b.m)) + floors.v_mean  # the last additions that make c
    d_x = (
        unit
        * frame.xv_mean.shape[0] ** 0.5
        * frobenius(frame.xv_mean)
        * frobenius(problem.adapters["value"].b)
    )
    (x, own_x, all_x), (v, own_v, all_v) = moved("value.a"), moved("v")
    x_rounded = rounded("value.a")
    v_rounded = rounded("v") + gamma + d_c / cols.sigma["v"].min()
    # rounding of the product itself: gamma |m_xb||c|
    largest = gamma * (jnp.abs(b.c) / cols.sigma["v"][:, None]).max(0, keepdims=True)
    on_c = x_rounded**2 + (d_x / cols.sigma["value.a"].min()) ** 2
    on_x = v_rounded**2 + largest**2
    size = jnp.abs(b.m_xb)
    centred = jnp.abs(b.m_xb - dot(problem.adapters["value"].b.T, frame.xv_mean)[:, None])
    add(
        "value.a",
        dot(jnp.abs(b.c), (live * x)[0]),
        dot(b.c**2, (live * on_c)[0]),
        dot(size, (live * v)[0]),
        dot(b.m_xb**2, (live * on_x)[0]),
        (live * (all_x + x_rounded) * (all_v + v_rounded)).sum(),
        dot(own_x * centred, jnp.abs(b.c).T) + dot(own_v * size, jnp.abs(b.m).T),
    )
    all_x, x_rounded, (v, own_v, _) = moved("value.b")[2], rounded("value.b"), moved("va")
    v_rounded = rounded("va") + gamma + d_c * frobenius(a) / cols.sigma["va"].min()
    ca = dot(a, b.c)
    m = jnp.abs(dot(a, b.m))
    ca_square = ca**2 + (frobenius(a) * _norm(b.c) * (unit * a.shape[1] ** 0.5 / gamma)) ** 2
    # a bound of |m(x)|, and of |E_f[x]|
    size = jnp.minimum(r.tilt[at["value.b"]], r.mean[at["value.b"]] + all_x) + all_x + x_rounded
    add(
        "value.b",
        dot(jnp.abs(ca), (live * all_x)[0]) + dot(m, (own_v * size)[0]),
        dot(ca**2, (live * x_rounded**2)[0]),
        (live * v).sum(),
        (live * v_rounded**2).sum(),
        (live * (v * (size + all_x + x_rounded) + v_rounded * all_x)).sum(),
        (live * (v_rounded * size) ** 2).sum(),
        gamma**2 * dot(ca_square, live[0]),
        gamma**2 * dot(ca_square, (live * size**2)[0]),
        dot(m, own_v[0]),
    )


def bounds(
    problem: LoRAProblem, cols: Columns, frame: Frame, sums: Sums, devices: int = 1
) -> dict[str, Adapter]:
    """The certified max-norm error of every array, sums over all `devices`: {name:
    Adapter(a=scalar, b=scalar)}.
    """
    scale, beta = scalars(problem)
    out = {}
    tokens = devices * (problem.x_query.shape[0] + problem.x_key.shape[0])
    for name in problem.adapters:
        pair = []
        for half in ("a", "b"):
            p = sums.parts[f"{name}.{half}"]
            sigma = cols.sigma[f"{name}.{half}"]
            if name == "query":
                worst = p[0] * sigma.max()
                squares = (p[1] + p[2]) * sigma.max() ** 2
            elif name == "key":
                worst = beta * p[0] * sigma.max()
                squares = (beta * sigma.max()) ** 2 * p[1]
            elif half == "a":
                sx = sigma[:, None]
                sv = cols.sigma["v"][None]
                worst = sx * p[0][None] + p[2][:, None] * sv + p[4] * sx * sv + p[5]
                squares = sx**2 * p[1][None] + p[3][:, None] * sv**2
            else:
                sx = sigma[:, None]
                sv = cols.sigma["va"][None]
                mean = jnp.abs(frame.xv_mean)[:, None]
                worst = sx * p[0][None] + mean * (p[2] * sv + p[8][None]) + p[4] * sx * sv
                squares = (
                    sx**2 * (p[1] + p[7])[None]
                    + mean**2 * (p[3] * sv**2 + p[6][None])
                    + p[5] * (sx * sv) ** 2
                )
            # what squares and weights lose when they underflow
            lost = (
                tokens
                * LAMBDA
                * jnp.finfo(problem.dtype).tiny ** 0.5
                * (1 + beta)
                * (1 + sigma.max())
            )
            bound = jnp.abs(scale) * (jnp.max(worst + LAMBDA * jnp.sqrt(squares)) + lost)
            pair.append(jnp.where(jnp.isnan(bound), jnp.inf, bound))
        out[name] = Adapter(*pair)
    return out
