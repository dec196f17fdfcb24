"""Sizes of factors and block trees that are refused."""

import pytest

import lora_limits as ll


@pytest.mark.parametrize(
    "name", ["Svd", "Skeleton", "Nystrom", "RandomFeatures", "AdaptedMonomials"]
)
@pytest.mark.parametrize("rank", [0, 2.5, True])
def test_a_rank_must_be_a_positive_integer(name, rank):
    with pytest.raises(
        ValueError, match=f"{name} rank: got {rank!r}, expected an integer of at least 1"
    ):
        getattr(ll, name)(rank)


def test_entries_and_degree_are_checked_too():
    with pytest.raises(ValueError, match="SparseLowRank entries: got 0"):
        ll.SparseLowRank(0, 4)
    with pytest.raises(ValueError, match="SparseLowRank rank: got 0"):
        ll.SparseLowRank(4, 0)
    with pytest.raises(ValueError, match="AdaptedMonomials degree: got 0"):
        ll.AdaptedMonomials(4, 0)


@pytest.mark.parametrize("field", ["near", "samples"])
def test_sizes_must_be_positive_integers(field):
    with pytest.raises(ValueError, match=f"BlockTree {field}: got 0, expected an integer"):
        ll.BlockTree(**{field: 0})
