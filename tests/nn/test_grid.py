"""The parameter grid of JAX's own tests of dot_product_attention, by every method that can be exact.

dtypes x heads that share keys x vmap x masks, forward and gradient. A factor as wide as there are
keys, a tree whose keys are all near and a polynomial of a high degree are exact, or nearly so.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

import lora_limits as ll
from tests.nn.test_namesake import MASKS, assert_near, inputs, namesake
from tests.support.tools import later, quick_jit

S = 12
METHODS = {
    "exact": (ll.Exact(), 2e-6),
    "tiled": (ll.Exact(4), 2e-6),
    "polynomial": (ll.Polynomial(10, block_size=4), 1e-4),
    "skeleton": (ll.Skeleton(S), 1e-2),
    "sparse": (ll.SparseLowRank(S, 1), 1e-4),
    "nystrom": (ll.Nystrom(2 * S), 1e-1),
    "monomials": (ll.AdaptedMonomials(400), 2e-2),
    "svd": (ll.Svd(S), 1e-4),
    "tree": (ll.BlockTree(), 1e-4),
}
ROUNDING = {"float32": 0, "bfloat16": 3e-2, "float16": 3e-3}
ANYWHERE = ("exact", "tiled", "polynomial")  # causal too
GRID = [
    (name, dtype, key_heads, vmapped, masks)
    for name, dtype, key_heads, vmapped, masks in itertools.product(
        METHODS, ROUNDING, (4, 2, 1), (False, True), ("none", "causal", "keys")
    )
    if masks != "causal" or name in ANYWHERE
    # Factors share their way through attention: one of them in every dtype is enough.
    if dtype == "float32" or name in (*ANYWHERE, "sparse", "tree")
]
# Every method once; the rest is for the slow tests.
FEW = [
    ("exact", "bfloat16", 2, True, "keys"),
    ("polynomial", "float32", 2, True, "causal"),
    ("sparse", "float16", 1, False, "keys"),
    ("tree", "float32", 2, True, "none"),
]


@pytest.mark.parametrize(
    ("name", "dtype", "key_heads", "vmapped", "masks"),
    [*FEW, *later(*(x for x in GRID if x not in FEW))],
)
def test_the_grid_of_jax(name, dtype, key_heads, vmapped, masks):
    method, tolerance = METHODS[name]
    options = MASKS[masks]()

    def run(function, many):
        def one(q, k, v, t):
            # Scores of order 1: polynomials are for such.
            out, back = jax.vjp(lambda q, k, v: function(q, k, v, scale=0.1, **options), q, k, v)
            return out, *back(t)

        return quick_jit(jax.vmap(one) if vmapped else one)(*many)

    seeds = (0, 1) if vmapped else (0,)
    arrays = [
        np.stack(x) for x in zip(*(inputs(dtype, key_heads, S, S, s) for s in seeds), strict=True)
    ]
    arrays = arrays if vmapped else [x[0] for x in arrays]
    if masks == "keys":
        # Queries that are taken for padding are a matter of the method, and not asked for.
        real = np.broadcast_to(np.swapaxes(options["mask"], 1, 3), arrays[3].shape)
        arrays[3] = arrays[3] * real.astype(dtype)
    want = run(namesake, [x.astype("float32") for x in arrays])
    got = run(functools.partial(ll.attention, method=method), arrays)
    want = [np.asarray(x).astype(dtype) for x in want]
    if masks == "keys":
        got, want = ([x[0] * real.astype(dtype), *x[1:]] for x in (got, want))
    assert_near(got, want, max(tolerance, ROUNDING[dtype]))
