"""Ranks by singular values and blocks under a tree, on matrices whose ranks are known."""

import numpy as np

from experiments import levels


def test_the_rank_is_the_least_that_leaves_no_more_than_the_tolerance():
    values = np.array([3.0, 2.0, 0.2, 0.1])
    size = np.sqrt((values**2).sum())
    assert levels.rank(values, 1e-12) == 4
    assert levels.rank(values, 0.11 / size) == 3
    assert levels.rank(values, 0.23 / size) == 2
    assert levels.rank(values, 2.1 / size) == 1
    assert levels.rank(values, 1.01) == 0


def test_blocks_of_the_tree_are_runs_of_tokens_that_lie_together():
    rng = np.random.default_rng(0)
    far = np.repeat(np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 5.0], [9.0, 5.0]]), 8, axis=0)
    x = (far + 0.01 * rng.normal(size=far.shape))[rng.permutation(32)]
    order = levels._halved(x, 2)
    assert sorted(order) == list(range(32))
    for part in np.split(x[order], 4):
        assert np.ptp(part, axis=0).max() < 1


def test_a_block_diagonal_matrix_is_stored_by_its_blocks():
    """Rank 8 as a whole, and 1 or 0 in the blocks of level 3."""
    blocks = np.kron(np.eye(8), np.ones((4, 4)))
    values = np.linalg.svd(blocks, compute_uv=False)
    whole = levels._level(levels._block_values(blocks, 0), 1e-6, values)
    fine = levels._level(levels._block_values(blocks, 3), 1e-6, values)
    assert whole == {"rank": 8.0, "most": 8, "stored": 2 * 32 * 8 / 32**2}
    assert fine == {"rank": 1 / 8, "most": 1, "stored": 8 * 2 * 4 / 32**2}
    # what is lost on every level stays within the tolerance, so that levels compare
    rough = blocks + 1e-4 * np.random.default_rng(1).normal(size=blocks.shape)
    values = np.linalg.svd(rough, compute_uv=False)
    assert levels._level(levels._block_values(rough, 3), 1e-2, values)["most"] == 1


def test_the_chain_is_as_wide_as_the_degree_that_f_needs():
    f = np.full((4, 4), 0.25)
    errors = [0.5, 0.1, 1e-3]

    def approximate(degree):
        return f * (1 + errors[min(degree, 2)])

    assert levels._chain_widths(approximate, f, 0.2, 3, 2) == {
        "f": 4, "q": 2, "p1": 8, "p2": 4, "p": 12,
    }  # fmt: skip
    assert levels._chain_widths(approximate, f, 1e-4, 3, 2)["f"] is None
