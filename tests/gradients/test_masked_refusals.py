"""What of a masked, rotary or packed problem is refused: fields that do not fit, at the door, and what
a method or a function does not know, by name.
"""

import dataclasses

import jax
import numpy as np
import pytest

import lora_limits as ll
from experiments.problems import conditioned as problems
from tests.support.masked_problems import FIELDS, L, having


def refusals():
    yield {"causal": 1}, "causal: got 1, expected True or False"
    yield {"window": 3}, "window: got 3, expected one beside causal=True"
    yield {"causal": True, "window": 0}, "window: got 0, expected an integer of at least 1"
    yield {"query_mask": np.ones(L)}, "query_mask: got float64, expected booleans"
    yield {"query_mask": [True] * L}, "query_mask: got list, expected booleans"
    yield {"key_mask": np.ones(L - 1, bool)}, r"key_mask: got shape \(12,\), expected \(13,\)"
    yield {"segments": np.zeros(L)}, "segments: got float64, expected integers"
    yield {"rotations": np.zeros(L)}, r"rotations of the query: got shape \(13,\), expected angles"
    yield {"rotations": np.zeros((L, 3))}, "rotations of the query: got 3 angles, expected from 1"
    yield {"rotations": np.zeros((9, 2))}, "rotations of the query: got 9 tokens, expected 13"
    yield {"rotations": np.zeros((L, 2), np.float32)}, "rotations of the query: got dtype float32"
    pair = (np.zeros((L, 2)), np.zeros((L, 1)))
    yield {"rotations": pair}, "rotations of the key: got 1 angles, expected 2"
    yield {"rotations": np.full((L, 2), np.nan)}, "rotations.query: got NaN or infinite entries"


@pytest.mark.parametrize(("fields", "message"), list(refusals()))
def test_what_does_not_fit_is_refused_at_the_door(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(having(), **fields)


@pytest.mark.parametrize("field", [{"causal": True}, {"segments": np.zeros(11, int)}])
def test_an_order_of_tokens_needs_as_many_queries_as_keys(field):
    p = problems.make(0, shape=problems.CROSS)
    with pytest.raises(ValueError, match="got 17 tokens, expected 11, as many as x_query"):
        dataclasses.replace(p, **field)


KNOWN_BY = [
    ll.Chain(2),
    ll.Polynomial(2),
    ll.BlockTree(),
    ll.Skeleton(2),
    ll.SparseLowRank(2, 2),
    ll.Nystrom(2),
    ll.Svd(2),
    ll.RandomFeatures(2),
    ll.AdaptedMonomials(2),
]


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "partial rotations"])
@pytest.mark.parametrize("method", KNOWN_BY, ids=lambda m: type(m).__name__)
def test_what_a_method_does_not_know_it_refuses_by_name(method, name):
    p = having(name)
    unknown = {name} - method.knows
    if unknown:
        with pytest.raises(ValueError, match=f"expected none: {type(method).__name__}.*not know"):
            ll.gradient(p, method)


@pytest.mark.parametrize("name", [n for n in FIELDS if n != "partial rotations"])
def test_functions_that_know_no_structure_refuse_it_by_name(name):
    p = having(name)
    mesh = jax.make_mesh((1,), ("x",))
    for run, who in (
        (lambda: ll.sharded_gradient(p, ll.Polynomial(2), mesh), "sharded_gradient"),
        (lambda: ll.streamed_gradient([p], ll.Polynomial(2)), "streamed_gradient"),
    ):
        with pytest.raises(ValueError, match=f"expected none: {who} does not know it"):
            run()
