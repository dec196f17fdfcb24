"""The one list of exact contenders: which blocks are in it, under which names, and the fastest."""

import pytest

import lora_limits as ll
from experiments.contenders import methods
from experiments.problems import conditioned as problems


@pytest.mark.parametrize(
    ("length", "options", "names"),
    [
        (4096, {}, ["exact 512", "exact 1024", "exact 2048"]),
        (1500, {"dense_up_to": 1500}, ["exact 512", "exact 1024", "exact dense"]),
        (1500, {"dense_up_to": 1499, "name": "tiled"}, ["tiled 512", "tiled 1024"]),
        (1024, {}, ["exact 512", "exact 1024"]),
        (64, {}, ["exact 64"]),
        (64, {"otherwise": 512}, ["exact 512"]),
        (4096, {"blocks": (1024,)}, ["exact 1024"]),
    ],
)
def test_every_block_that_fits_is_a_contender_and_there_is_always_one(length, options, names):
    found = methods.exact_methods(length, **options)
    assert list(found) == names
    for name, method in found.items():
        block = name.split()[1]
        assert method == (ll.Exact() if block == "dense" else ll.Exact(int(block)))


def test_the_fastest_is_of_those_named_and_the_first_of_equals():
    times = {name: {"seconds": t} for name, t in (("a", 3.0), ("b", 2.0), ("c", 2.0), ("d", 1.0))}
    assert methods.fastest(times, ("a", "c", "b")) == "c"


def test_errors_are_the_worst_of_the_projections():
    problem = problems.make(0)
    found = methods.errors_by_method([problem], {"again": ll.Exact(5), "coarse": ll.Polynomial(1)})
    assert found["again"][0] < 1e-12 < 1e-6 < found["coarse"][0]
