"""The fast gradient: every sum over tokens through k features, in three sweeps over blocks of
tokens.

With s_ij = x_i . y_j, f~_ij = w_j P(s_ij) / D_i and P(s_ij) = psi(x_i) . C phi(y_j), C =
diag(c_|alpha| multinomial):

    keys       M = sum_j w_j phi(y_j) [1, v_j, X_V,j B]              k x (1 + d_value + r)
    queries    [D, D m(v), D m(X_V B)] = psi(x_i) C M;  c~ = m(v) + v_mean - Y;  rho = c~ . m(v)
               g_i = [-rho, c~] / D_i                                (the derivative of 1/2 |c~|^2 in psi C M)
               dl/dQ_i = to_x^T grad_x (psi(x) C M g_i)
               T = sum_i psi(x_i) g_i,  T_V = sum_i psi(x_i) c~_i A^T / D_i
    keys       u_j = phi(y_j) C T;  dl/dK_j = w_j (to_y^T grad_y (u . [1, v_j]) + beta nu (u_j . [1, v_j]))
               dl/dV_j A^T = w_j phi(y_j) . C T_V

The third sweep exists only for key adapters and for B of the value adapter. Sums over tokens build
the features; what is evaluated at a token, with its gradient, needs only those of degree g - 1
(lift.py). This is the exact gradient of the factored forward with its centres held constant: the
paper's chain with two factors, P in the normaliser, mean and residual, and P' in the kernel (for
Taylor: one degree lower). Its error is of the order of the chain's at degree g - 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_limits.certificate import bound as certificate
from lora_limits.certificate import columns, row_bounds
from lora_limits.coordinates import blocks, collectives
from lora_limits.coordinates import frame as frames
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.frame import Frame, rows, sweep
from lora_limits.estimate import rows as estimate
from lora_limits.linalg import dot, down
from lora_limits.polynomial import evaluation, monomials, series
from lora_limits.problem import Adapter, LoRAProblem, project, project_columns, scalars


def _summarise(problem, frame, table, cols, degree: int, block: int, axis: Axis = None):
    """First sweep: M (k, 1 + d_value + r), the certificate's key moments, the longest centred input
    rows; all keys'.
    """
    d = frame.nu.shape[0]
    count = len(columns.names(problem))
    dtype = problem.dtype
    width = 1 + table.value.shape[1]
    whole = row_bounds.whole(degree)
    below = monomials.count(d, max(degree - 1, 0))
    checked_shape = (monomials.count(d, degree), count) if whole else (below, 2 * count)
    zero = jnp.zeros((), dtype)
    start = (
        jnp.zeros((monomials.count(d, degree), width), dtype),
        jnp.zeros(checked_shape, dtype),
        jnp.zeros((degree + 1, count), dtype),
        jnp.zeros((d, d), dtype),
        (zero, jnp.zeros(d, dtype), zero, zero),
    )

    def body(carry, first, fresh):
        total, checked, radial, second, largest = carry
        t = blocks.keys(problem, frame, table, first, fresh, block)
        parts = monomials.by_degree(t.y, degree)
        z = jnp.concatenate([jnp.ones_like(t.w), t.v, t.xv_b]) * t.w
        norm = jnp.sqrt(down(t.y**2))
        # the key itself, not y taken back: that would cost digits that the certificate counts on
        k = project_columns(problem, "key", t.xk + (frame.xk_mean - frame.k_shift)[None])
        zc = columns.measure(problem, cols, t, k) * t.w
        if whole:
            checked = checked + monomials.products(parts, zc)
        else:
            odd = zc * norm if degree else zc
            checked = checked + dot(
                jnp.concatenate(parts[: max(degree, 1)]), jnp.concatenate([zc, odd]).T
            )
        total = total + monomials.products(parts, z)
        radial = radial + dot(row_bounds.powers(norm, degree), zc.T)
        second = second + dot(t.y, (t.y * t.w).T)
        lengths = (
            (x**2).sum(1).max() for x in (t.xk + (frame.xk_mean - frame.k_shift)[None], t.xv)
        )
        box = jnp.where(fresh[None], jnp.abs(t.y), 0).max(1)
        found = (
            jnp.where(fresh[None], norm, 0).max(),
            box,
            *(jnp.sqrt(length) for length in lengths),
        )
        largest = tuple(jnp.maximum(old, new) for old, new in zip(largest, found, strict=True))
        return total, checked, radial, second, largest

    *sums, largest = sweep(problem.x_key.shape[0], block, body, start)
    total, checked, radial, second = collectives.total(sums, axis)
    reach, box, *longest = collectives.largest(largest, axis)
    if whole:
        low = checked[:below]
        top = checked[below:]
    else:
        low = checked[:, :count]
        top = checked[monomials.count(d, degree - 2) if degree else 0 :, count:]
    return total, row_bounds.KeyMoments(low, top, radial, second, reach, box), longest


def _query_radius(
    problem: LoRAProblem, frame: Frame, table, moments, block: int, axis: Axis
) -> jax.Array:
    """R >= every |score|; needed ahead of time by the series that depend on it."""

    def body(radius, first, fresh):
        x = blocks.queries(problem, frame, table, first, block).x
        return jnp.maximum(radius, row_bounds.row_range(x, moments.reach, moments.box).max())

    return collectives.largest(
        sweep(problem.x_query.shape[0], block, body, jnp.zeros((), problem.dtype)), axis
    )


def _setup(
    problem, frame, table, moments, method, gamma: float, block: int, axis: Axis = None
) -> row_bounds.Setup:
    """The polynomial and the envelopes of what it leaves out."""
    dtype = problem.dtype
    g = method.degree
    if method.series == "taylor":
        return row_bounds.Setup(series.taylor(g, dtype), None, None, gamma, method.centred)
    radius = jnp.maximum(
        _query_radius(problem, frame, table, moments, block, axis) * (1 + 32 * gamma), 0.05
    )
    xq = frames.sample_rows(problem.x_query, 64, axis)
    xk = frames.sample_rows(problem.x_key, axis=axis)
    x = frames.own(
        dot(project(problem, "query", xq) - frame.nu[None], frame.to_x.T),
        problem.x_query.shape[0],
        axis,
    )
    y = frames.own(
        dot(project(problem, "key", xk) - frame.mu[None], frame.to_y.T),
        problem.x_key.shape[0],
        axis,
    )
    x, y, w = collectives.total((x, y, frames.sample_weights(problem, frame, axis)), axis)
    s = jnp.clip(dot(x, y.T), -radius, radius).reshape(-1)
    w = jnp.tile(w, x.shape[0]) + jnp.finfo(dtype).tiny
    c = series.coefficients(method.series, g, radius, (s, w))
    mean = [(w * jnp.abs(s) ** p).sum() / w.sum() for p in (g, g + 1)]
    h = series.envelope(c, radius, g + 1, mean[1])
    # where P is a constant its derivative is 0, and exp itself is what is left out
    h_prime = series.envelope(series.derivative(c), radius, g, mean[0])
    return row_bounds.Setup(c, h, h_prime, gamma, method.centred)


class Queries(NamedTuple):
    """Carry of the second sweep."""

    loss: jax.Array
    gradient: dict[str, Any]
    back: jax.Array | None  # [T, T_V], those of them that the adapters need
    ca: jax.Array | None  # sum of c~ A^T
    sums: certificate.Sums


def _visit_queries(
    problem, frame, table, cols, setup, moments, m, floors, block: int, axis: Axis
) -> Queries:
    """Second sweep: loss, gradients that live on queries, and T for those that live on keys."""
    degree = setup.c.shape[0] - 1
    dtype = problem.dtype
    dv = frame.v_mean.shape[0]
    names = problem.adapters
    late = ("key" in names) * (1 + dv) + (names["value"].a.shape[0] if "value" in names else 0)
    width = frame.nu.shape[0]
    polynomials = evaluation.make(m, 1 + dv if "query" in names else 0, width, degree)
    checked = row_bounds.polynomials(setup, moments, width)
    zero = {n: jax.tree.map(jnp.zeros_like, names[n]) for n in ("query", "value") if n in names}
    start = Queries(
        jnp.zeros((), dtype),
        {n: (z if n == "query" else z.a) for n, z in zero.items()},
        jnp.zeros((m.shape[0], late), dtype) if late else None,
        jnp.zeros(names["value"].a.shape[0], dtype) if "value" in names else None,
        certificate.zero_sums(problem),
    )

    def body(carry: Queries, first, fresh):
        t = blocks.queries(problem, frame, table, first, block)
        parts = monomials.by_degree(t.x, degree if late else max(degree - 1, 0))
        lower = parts[: max(degree, 1)]
        values = evaluation.evaluate(polynomials, t.x, lower)
        u = values.low + values.top
        target = rows(problem.target, first, block).T
        live = fresh.astype(dtype)[None]
        mean = u[1:] / u[:1]
        c = mean[:dv] + frame.v_mean[:, None] - target
        g = jnp.concatenate([-down(c * mean[:dv]), c]) * (live / u[:1])
        gradient = dict(carry.gradient)
        dq = None
        m_xb = None
        ca = carry.ca
        back = []
        if "query" in names:
            dx = evaluation.slope(polynomials, values, t.x, lower, g)
            dq = dot(frame.to_x.T, dx)
            old = gradient["query"]
            a_dq = dot(dot(names["query"].a, frame.to_x.T), dx)
            gradient["query"] = Adapter(old.a + dot(t.xq_b, dx.T), old.b + dot(t.xq.T, a_dq.T))
        if "key" in names:
            back.append(g)
        if "value" in names and carry.ca is not None:
            value = names["value"]
            c_live = c * live
            m_xb = mean[dv:] + dot(value.b.T, frame.xv_mean)[:, None]
            gradient["value"] = gradient["value"] + dot(m_xb, c_live.T)
            ca_rows = dot(value.a, c_live)
            back.append(ca_rows / u[:1])
            ca = carry.ca + ca_rows.sum(1)
        total = (
            None
            if carry.back is None
            else carry.back + monomials.products(parts, jnp.concatenate(back))
        )
        d_score, d_query, lengths = columns.score_rounding(
            problem, frame, floors, t.xq, t.x, moments.reach
        )
        bounds = row_bounds.rows(
            setup, moments, t.x, evaluation.evaluate(checked, t.x, lower), u[:1], d_score
        )
        scale_y = jnp.sqrt(down(target**2)) + jnp.sqrt((frame.v_mean**2).sum())
        q = (
            project_columns(problem, "query", t.xq - frame.q_shift[None])
            if "key" in names
            else None
        )
        visit = certificate.Block(
            t.xq, t.xq_b, q, dq, c, mean[:dv], m_xb, scale_y, d_score, d_query, lengths, live
        )
        sums = certificate.add_queries(
            problem, setup, cols, frame, floors, carry.sums, visit, bounds
        )
        return Queries(carry.loss + 0.5 * (live * c**2).sum(), gradient, total, ca, sums)

    seen = sweep(problem.x_query.shape[0], block, body, start)
    certain = collectives.smallest(seen.sums.certain, axis)
    seen = collectives.total(seen, axis)
    return seen._replace(sums=seen.sums._replace(certain=certain))


def _visit_keys(
    problem, frame, table, back: jax.Array, degree: int, block: int, axis: Axis
) -> dict[str, Any]:
    """Third sweep: the key adapter, and B of the value adapter. Both live on keys. back: C [T,
    T_V].
    """
    names = problem.adapters
    d = frame.nu.shape[0]
    slopes = 1 + frame.v_mean.shape[0] if "key" in names else 0
    polynomials = evaluation.make(back, slopes, d, degree)
    start: dict[str, Any] = {}
    if "key" in names:
        r = names["key"].a.shape[0]
        width = problem.x_key.shape[1]
        start["key"] = Adapter(
            jnp.zeros((r, d + 1), problem.dtype), jnp.zeros((width, r), problem.dtype)
        )
    if "value" in names:
        start["value"] = jnp.zeros_like(names["value"].b)

    def body(carry, first, fresh):
        t = blocks.keys(problem, frame, table, first, fresh, block)
        parts = monomials.by_degree(t.y, max(degree - 1, 0))
        out = dict(carry)
        values = evaluation.evaluate(polynomials, t.y, parts)
        u = values.low + values.top
        if "key" in names:
            z = jnp.concatenate([t.w, t.v * t.w])
            dy = jnp.concatenate(
                [
                    evaluation.slope(polynomials, values, t.y, parts, z),
                    (u[:slopes] * z).sum(0)[None],
                ]
            )
            a_dk = dot(dot(names["key"].a, _from_y(problem, frame).T), dy)
            out["key"] = Adapter(
                carry["key"].a + dot(t.xk_b, dy.T), carry["key"].b + dot(t.xk.T, a_dk.T)
            )
        if "value" in names:
            out["value"] = carry["value"] + dot(t.xv.T, (u[slopes:] * t.w).T)
        return out

    return collectives.total(sweep(problem.x_key.shape[0], block, body, start), axis)


def _from_y(problem: LoRAProblem, frame: Frame) -> jax.Array:
    """(d + 1, d): what a gradient in (y, log-weight) is in the key itself."""
    return jnp.concatenate([frame.to_y, scalars(problem)[1] * frame.nu[None]])


def run(
    problem: LoRAProblem,
    method,
    sampled: int | None = None,
    key: jax.Array | None = None,
    axis: Axis = None,
):
    """(loss, gradients, bounds, certified normaliser, estimate from `sampled` rows or None) of a
    Polynomial method.

    Time O((Lq + Lk) k (1 + d_value + r) + L d_model (d + r)), memory O(k d (1 + d_value + r) +
    block (k + d d_value)). axis: as in `frame.make`; O(k (1 + d_value + r) + d_model r) crosses it.
    The result is the same on every device.
    """
    d = problem.weights.query.shape[1]
    degree = method.degree
    names = problem.adapters
    block = method.block_size or blocks.block_size(problem, degree)
    frame = frames.make(problem, block, method.centred, axis)
    table = blocks.maps(problem, frame)
    cols = columns.columns(problem, frame, axis)
    m, moments, longest = _summarise(problem, frame, table, cols, degree, block, axis)
    gamma = columns.rounding_unit(problem, m.shape[0], degree, block, collectives.devices(axis))
    setup = _setup(problem, frame, table, moments, method, gamma, block, axis)
    order, multinomial = monomials.tables(d, degree)
    coefficient = (setup.c[order.astype(int)] * jnp.asarray(multinomial, problem.dtype))[:, None]
    floors = columns.floors(problem, frame, cols, *longest)
    seen = _visit_queries(
        problem, frame, table, cols, setup, moments, m * coefficient, floors, block, axis
    )
    gradient = dict(seen.gradient)
    late = {}
    if seen.back is not None:
        late = _visit_keys(problem, frame, table, seen.back * coefficient, degree, block, axis)
    if "query" in names:
        gradient["query"] = Adapter(dot(gradient["query"].a, frame.to_x), gradient["query"].b)
    if "key" in names:
        gradient["key"] = Adapter(dot(late["key"].a, _from_y(problem, frame)), late["key"].b)
    if seen.ca is not None:
        gradient["value"] = Adapter(
            gradient["value"], late["value"] + frame.xv_mean[:, None] * seen.ca[None]
        )
    scale = scalars(problem)[0]
    gradient = {n: jax.tree.map(lambda x: scale * x, gradient[n]) for n in names}
    bound = certificate.bounds(problem, cols, frame, seen.sums, collectives.devices(axis))
    estimated = None
    if sampled is not None and key is not None:
        estimated = estimate.error_estimate(
            problem, frame, setup.c, rows=sampled, key=key, block=block
        )
    return seen.loss, gradient, bound, seen.sums.certain, estimated
