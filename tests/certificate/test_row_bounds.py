"""Row bounds of the certificate, one by one, against the sums over keys that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_limits.certificate import row_bounds
from lora_limits.polynomial import monomials, series
from tests.support.tools import quick_jit

GAMMA = 1e-12  # rounding, here of float64


def draw(rng, width, centred):
    """Weights (n,), keys (d, n), columns (2, n) and queries (d, m). Columns have a mean of 1 where
    not centred.
    """
    w = rng.uniform(0.5, 1.5, 12)
    w, y, z = (
        w / w.sum(),
        rng.normal(size=(width, 12)),
        rng.normal(size=(2, 12)) / np.array([[2], [20]]),
    )
    y, z = (u - (u @ w)[:, None] for u in (y, z))
    if not centred:
        y, z = y + 0.5, z + 1
    return w, y, z, rng.normal(size=(width, 40)) * np.geomspace(1e-3, 0.6, 40)


def bounds(degree):
    """(weights, keys, columns, queries) -> Rows, its moments summed over keys as their comments
    say.
    """

    def run(w, y, z, x):
        width, t = y.shape[0], row_bounds.even_order(degree)
        setup = row_bounds.Setup(series.taylor(degree, y.dtype), None, None, GAMMA)
        wz = w[None] * jnp.concatenate([jnp.ones_like(w)[None], z**2])
        norm = jnp.sqrt((y**2).sum(0, keepdims=True))
        parts = monomials.by_degree(y, degree)
        moments = row_bounds.KeyMoments(
            jnp.concatenate(parts[: max(degree, 1)]) @ wz.T,
            parts[t] @ (norm ** (degree - t) * wz).T,
            row_bounds.powers(norm, degree) @ wz.T,
            (y * w[None]) @ y.T,
            y @ w,
            jnp.concatenate([jnp.zeros(1), jnp.abs(z @ w)]),
            norm.max(),
            jnp.abs(y).max(1),
            w.min(),
        )
        polynomials = row_bounds.polynomials(setup, moments, width)
        values = row_bounds.evaluate(polynomials, degree, monomials.by_degree(x, degree))
        d_sum = w[None] @ sum(c * (x.T @ y).T ** n for n, c in enumerate(setup.c))
        return row_bounds.rows(setup, moments, x, values, d_sum, jnp.zeros_like(d_sum))

    return quick_jit(run)


@pytest.mark.parametrize(("degree", "centred"), [(1, True), (2, False), (3, True)])
def test_every_row_bound_holds_of_the_dense_sums(degree, centred):
    """Uncentred, |E_f[x]| is about 1 however small the scores; centred, it vanishes with them and
    so does its bound.
    """
    width = 2
    w, y, z, x = draw(np.random.default_rng(degree), width, centred)
    got = jax.tree.map(np.asarray, bounds(degree)(w, y, z, x))
    s, c = x.T @ y, np.asarray(series.taylor(degree, np.float64))
    p, prime = w * np.polyval(c[::-1], s), w * np.polyval(c[:0:-1] * np.arange(degree, 0, -1), s)
    exact, d = w * np.exp(s), p.sum(1, keepdims=True)
    f, squares = (exact / exact.sum(1, keepdims=True)).T, np.concatenate([np.ones((1, 12)), z**2])
    less = 1 + 1e-9
    assert (np.abs(z @ f) <= got.centre[1:] * less).all()
    assert (np.abs(z @ (p / d).T) <= got.tilt[1:] * less).all()
    if centred:
        assert (got.centre[1:, 0] < 2e-2 * got.mean[1:, 0]).all()
    assert (squares @ f <= got.mean**2 * less).all()
    assert (squares @ (np.abs(exact - p) / d).T <= got.eta**2 * less).all()
    assert (squares @ (np.abs(exact - prime) / d).T <= got.eta_prime**2 * less).all()
    assert (1 / (1 + ((exact - p) / d).sum(1)) <= got.slack[0] * less).all()
    assert (got.certain[0] <= d[:, 0] / w.sum() * less).all()
    # not by being infinite, and not by much where scores are small
    assert np.isfinite(np.concatenate(got)).all()
    assert (got.mean[:, 0] ** 2 < 1.1 * (squares @ f)[:, 0]).all()
