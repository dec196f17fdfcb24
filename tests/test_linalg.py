"""What the library's own products and maxima promise beyond JAX's."""

import jax
import numpy as np
import pytest

from lora_limits.linalg import largest


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3,), (4096,), (64, 64), (500, 3, 3)])
def test_a_largest_entry_is_no_number_where_one_is_none(dtype, shape):
    """JAX's own maximum passes NaN by in arrays of thousands of entries on some processors."""
    x = np.random.default_rng(0).uniform(size=shape).astype(dtype)
    assert jax.jit(largest)(x) == x.max()
    for place in (0, x.size // 2, x.size - 1):
        lost = x.copy()
        lost.flat[place] = np.nan
        assert np.isnan(jax.jit(largest)(lost))
