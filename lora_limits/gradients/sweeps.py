"""The fast gradient: every sum over tokens through k features, in three sweeps over blocks.

With s_ij = x_i . y_j, f~_ij = w_j P(s_ij) / D_i and P(s_ij) = psi(x_i) . C phi(y_j), where
C = diag(c_|alpha| multinomial):

    1  keys       M = sum_j w_j phi(y_j) [1, v_j, X_V,j B]            k x (1 + d_value + r)
    2  queries    [D, D m(v), D m(X_V B)] = psi(x_i) C M
                  c~ = m(v) + v_mean - Y,   rho = c~ . m(v)
                  g_i = [-rho, c~] / D_i          the derivative of 1/2 |c~|^2 in psi C M
                  dl/dQ_i = to_x^T grad_x (psi(x) C M g_i)
                  T = sum_i psi(x_i) g_i,   T_V = sum_i psi(x_i) c~_i A^T / D_i
    3  keys       u_j = phi(y_j) C T
                  dl/dK_j = w_j (to_y^T grad_y (u . [1, v_j]) + beta nu (u_j . [1, v_j]))
                  dl/dV_j A^T = w_j phi(y_j) . C T_V

The third sweep exists only for key adapters and for B of the value adapter. Sums over tokens build
the features; what is evaluated at a token, with its gradient, needs only those of degree g - 1
(polynomial/evaluation.py). This is the exact gradient of the factored forward with its centres held
constant: the paper's chain with two factors, P in the normaliser, mean and residual, and P' in the
kernel (for Taylor: one degree lower). Its error is of the order of the chain's at degree g - 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_limits.certificate import bound, floors, row_bounds
from lora_limits.certificate.rounding import column_lengths, frobenius
from lora_limits.certificate.terms import Grounds, Visit
from lora_limits.coordinates import collectives
from lora_limits.coordinates.blocks import Queries
from lora_limits.coordinates.collectives import Axis
from lora_limits.coordinates.sweep import rows, sweep
from lora_limits.gradients.plan import Plan
from lora_limits.linalg import dot, down
from lora_limits.polynomial import evaluation, monomials
from lora_limits.problem import Adapter, project_columns


class Seen(NamedTuple):
    """Carry of the second sweep."""

    loss: Float[Array, ""]
    gradient: dict[str, Any]
    back: Float[Array, "k columns"] | None  # [T, T_V], those of them that the adapters need
    ca: Float[Array, " rv"] | None  # sum of c~ A^T
    sums: bound.Sums | None  # of the certificate
    each: bound.PerQuery | None  # what it says of each query, where queries are to be sampled


def _nothing_seen(plan: Plan) -> Seen:
    problem = plan.problem
    adapters = problem.adapters
    r = adapters["value"].a.shape[0] if "value" in adapters else 0
    back = ("key" in adapters) * (1 + plan.value_width) + r
    arrays = len(bound.arrays_of(problem))
    nothing = jnp.zeros((arrays, problem.x_query.shape[0]), problem.dtype)
    gradient: dict[str, Any] = {}
    if "query" in adapters:
        gradient["query"] = jax.tree.map(jnp.zeros_like, adapters["query"])
    if "value" in adapters:
        gradient["value"] = jnp.zeros_like(adapters["value"].a)
    return Seen(
        loss=jnp.zeros((), problem.dtype),
        gradient=gradient,
        back=jnp.zeros((plan.features, back), problem.dtype) if back else None,
        ca=jnp.zeros(r, problem.dtype) if r else None,
        sums=None if plan.columns is None else bound.zero(problem),
        each=None if not plan.sampled else bound.PerQuery(nothing, nothing),
    )


def visit_queries(plan: Plan, grounds: Grounds | None, m: Float[Array, "k columns"]) -> Seen:
    """Second sweep: loss, gradients that live on queries, and T for those that live on keys.

    m: C M. grounds: None where nothing is certified.
    """
    problem, frame, degree = plan.problem, plan.frame, plan.degree
    adapters, dv = problem.adapters, plan.value_width
    start = _nothing_seen(plan)
    # only a query adapter asks for slopes at the queries, of D and D m(v)
    slopes = 1 + dv if "query" in adapters else 0
    polynomials = evaluation.make(m, slopes, plan.width, degree)
    # T is made of all features, the gradient at the queries of those below the top degree
    highest = degree if start.back is not None else max(degree - 1, 0)
    checked = None
    if grounds is not None:
        checked = row_bounds.polynomials(grounds.setup, grounds.moments, plan.width)
        highest = max(highest, row_bounds.even_order(degree))

    def body(carry: Seen, first, fresh):
        t = plan.queries(first)
        parts = monomials.by_degree(t.x, highest)
        lower = parts[: max(degree, 1)]
        # u = [D, D m(v), D m(X_V B)]
        values = evaluation.evaluate(polynomials, t.x, lower)
        u = values.low + values.top
        target = rows(problem.target, first, plan.block, problem.dtype).T
        live = fresh.astype(problem.dtype)[None]
        mean = u[1:] / u[:1]
        mean_v = mean[:dv]
        c = mean_v + frame.v_mean[:, None] - target
        g = jnp.concatenate([-down(c * mean_v), c]) * (live / u[:1])
        gradient = dict(carry.gradient)
        back = []
        dq, m_xb, ca = None, None, carry.ca
        if "query" in adapters:
            dx = evaluation.slope(polynomials, values, t.x, lower, g)
            dq = dot(frame.to_x.T, dx)
            gradient["query"] = _add_query(plan, gradient["query"], t, dx)
        if "key" in adapters:
            back.append(g)
        if "value" in adapters and carry.ca is not None:
            value = adapters["value"]
            # centred X_V B has lost the mean's share
            m_xb = mean[dv:] + dot(value.b.T, frame.xv_mean)[:, None]
            gradient["value"] = gradient["value"] + dot(m_xb, (c * live).T)
            c_a = dot(value.a, c * live)
            back.append(c_a / u[:1])
            ca = carry.ca + c_a.sum(1)
        total = carry.back
        if total is not None:
            total = total + monomials.products(parts, jnp.concatenate(back))
        sums, each = carry.sums, carry.each
        if grounds is not None and checked is not None and sums is not None:
            at_rows = row_bounds.evaluate(checked, degree, parts)
            scale_y = column_lengths(target) + frobenius(frame.v_mean)
            block = _Block(t, dq, c, mean_v, m_xb, scale_y, u[:1], live)
            sums, found = _certify(plan, grounds, sums, block, at_rows)
            each = None if each is None else _written(each, found, first)
        return Seen(carry.loss + 0.5 * (live * c**2).sum(), gradient, total, ca, sums, each)

    return _of_all(sweep(problem.x_query.shape[0], plan.block, body, start), plan.axis)


def _of_all(seen: Seen, axis: Axis) -> Seen:
    """What the queries of all devices leave."""
    if seen.sums is None:
        return collectives.total(seen, axis)
    certain = collectives.smallest(seen.sums.certain, axis)
    score, largest = collectives.largest((seen.sums.score, seen.sums.largest), axis)
    seen = collectives.total(seen, axis)
    assert seen.sums is not None
    sums = seen.sums._replace(certain=certain, score=score, largest=largest)
    return seen._replace(sums=sums)


def joined(a: Seen, b: Seen) -> Seen:
    """What two parts of the queries leave together, of which neither was kept query by query."""
    seen = jax.tree.map(jnp.add, a, b)
    if a.sums is None or b.sums is None:
        return seen
    sums = seen.sums._replace(
        certain=jnp.minimum(a.sums.certain, b.sums.certain),
        score=jnp.maximum(a.sums.score, b.sums.score),
        largest=jnp.maximum(a.sums.largest, b.sums.largest),
    )
    return seen._replace(sums=sums)


class _Block(NamedTuple):
    """What the second sweep has of a block of queries, for the certificate."""

    t: Queries
    dq: jax.Array | None
    c: jax.Array
    m: jax.Array
    m_xb: jax.Array | None
    scale_y: jax.Array
    d_sum: jax.Array
    live: jax.Array


def _certify(
    plan: Plan, grounds: Grounds, sums: bound.Sums, block: _Block, values: row_bounds.Polynomials
) -> tuple[bound.Sums, bound.PerQuery]:
    """Adds a block of queries to the certificate; values: of `row_bounds.evaluate`."""
    problem, frame, t = plan.problem, plan.frame, block.t
    rounded = floors.query_rounding(
        problem, frame, grounds.floors, t.xq, t.x, grounds.moments.reach
    )
    q = None
    if "key" in problem.adapters:
        q = project_columns(problem, "query", t.xq - frame.q_shift[None])
    visit = Visit(
        t.xq,
        t.x,
        t.xq_b,
        q,
        block.dq,
        block.c,
        block.m,
        block.m_xb,
        block.scale_y,
        rounded,
        block.live,
    )
    rows = row_bounds.rows(grounds.setup, grounds.moments, t.x, values, block.d_sum, rounded.score)
    return bound.add(grounds, sums, visit, rows)


def _written(each: bound.PerQuery, found: bound.PerQuery, first: jax.Array) -> bound.PerQuery:
    """`each` with a block of queries written in; a query seen before keeps what it has."""

    def put(old, new):
        kept = jax.lax.dynamic_slice_in_dim(old, first, new.shape[1], 1)
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.maximum(kept, new), first, 1)

    return jax.tree.map(put, each, found)


def _add_query(plan: Plan, old: Adapter, t: Queries, dx: Float[Array, "d n"]) -> Adapter:
    """Adds a block to the query adapter's gradient: dA still in the frame's coordinates.

    dA = (X_Q B)^T dx to_x,  dB = X_Q^T (dx to_x A^T).
    """
    a_dq = dot(dot(plan.problem.adapters["query"].a, plan.frame.to_x.T), dx)
    return Adapter(old.a + dot(t.xq_b, dx.T), old.b + dot(t.xq.T, a_dq.T))


def visit_keys(plan: Plan, back: Float[Array, "k columns"]) -> dict[str, Any]:
    """Third sweep: the key adapter, and B of the value adapter. Both live on keys. back: C [T, T_V]."""
    problem, degree, d = plan.problem, plan.degree, plan.width
    adapters = problem.adapters
    slopes = 1 + plan.value_width if "key" in adapters else 0
    polynomials = evaluation.make(back, slopes, d, degree)
    start: dict[str, Any] = {}
    if "key" in adapters:
        r = adapters["key"].a.shape[0]
        width = problem.x_key.shape[1]
        start["key"] = Adapter(
            jnp.zeros((r, d + 1), problem.dtype), jnp.zeros((width, r), problem.dtype)
        )
    if "value" in adapters:
        start["value"] = jnp.zeros_like(adapters["value"].b)

    def body(carry, first, fresh):
        t = plan.keys(first, fresh)
        parts = monomials.by_degree(t.y, max(degree - 1, 0))
        values = evaluation.evaluate(polynomials, t.y, parts)
        u = values.low + values.top
        out = dict(carry)
        if "key" in adapters:
            z = jnp.concatenate([t.w, t.v * t.w])
            dy = evaluation.slope(polynomials, values, t.y, parts, z)
            # the derivative in the log-weight
            dw = (u[:slopes] * z).sum(0)
            dy = jnp.concatenate([dy, dw[None]])
            a_dk = dot(dot(adapters["key"].a, plan.from_y().T), dy)
            old = carry["key"]
            out["key"] = Adapter(old.a + dot(t.xk_b, dy.T), old.b + dot(t.xk.T, a_dk.T))
        if "value" in adapters:
            out["value"] = carry["value"] + dot(t.xv.T, (u[slopes:] * t.w).T)
        return out

    return collectives.total(sweep(problem.x_key.shape[0], plan.block, body, start), plan.axis)
