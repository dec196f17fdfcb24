"""What the certificate assumes of the arithmetic, tried on the backend in use."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_limits.certificate.rounding import EXP_ULP


def test_exp_errs_by_no_more_units_in_the_last_place_than_assumed():
    """Wherever neither it nor its reciprocal underflows, against extended precision."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-reach, reach, 100_000) for reach in (1e-8, 1, 40, 700)])
    got = np.asarray(jax.jit(jnp.exp)(x))
    true = np.exp(x.astype(np.longdouble))
    ulps = np.abs(got - true) / np.spacing(true.astype(np.float64))
    assert float(ulps.max()) <= EXP_ULP


def test_log_errs_by_no_more_units_in_the_last_place_than_assumed():
    x = np.exp(np.random.default_rng(2).uniform(-700, 0, 100_000))
    true = np.log(x.astype(np.longdouble))
    ulps = np.abs(np.asarray(jax.jit(jnp.log)(x)) - true) / np.spacing(np.abs(true).astype(float))
    assert float(ulps.max()) <= EXP_ULP


def test_turns_err_by_no_more_units_than_assumed_however_large_the_angle():
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(-reach, reach, 50_000) for reach in (1e-3, 7, 1e4, 1e7)])
    for ours, theirs in ((jnp.cos, np.cos), (jnp.sin, np.sin)):
        error = np.abs(np.asarray(jax.jit(ours)(x)) - theirs(x.astype(np.longdouble)))
        assert float(error.max()) <= EXP_ULP * np.finfo(np.float64).eps / 2


def test_sums_of_products_err_by_no_more_than_gamma():
    """A product of the kind the sweeps are made of: 2048 terms, their absolute sum beside it."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 64, 2048))
    got = np.asarray(jax.jit(lambda a, b: jnp.matmul(a, b.T, precision="highest"))(a, b))
    true = a.astype(np.longdouble) @ b.T.astype(np.longdouble)
    size = np.abs(a) @ np.abs(b).T
    n, u = a.shape[1], np.finfo(np.float64).eps / 2
    assert float((np.abs(got - true) / size).max()) <= n * u / (1 - n * u)
