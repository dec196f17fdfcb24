"""What the figure of the phase boundary reads off its rows, on rows whose curves are known."""

import math

import numpy as np
import pytest

from lora_limits.polynomial import law
from paper_figures import phase_boundary
from paper_figures.drawing import boundary, style

GAMMAS = [0.25 * 2 ** (n / 4) for n in range(17)]


def cell(length, gamma, seed=0, family="uniform", share=0.2, width=8):
    """A cell that follows the law exactly."""
    out = {
        "kind": "accuracy",
        "slice": "fixed",
        "family": family,
        "length": length,
        "width": width,
        "gamma": gamma,
        "seed": seed,
        "score_bound": gamma**2,
        "score_ratio": gamma**2 / math.log(length),
    }
    for name, eps in (("1/L", 1 / length), ("1%", 0.01)):
        real = law.degree_of(share * gamma**2, eps)
        exponent = boundary.log_width(width, real) / math.log(length)
        degree = max(math.ceil(real), 1)
        out[name] = {"real": real, "degree": degree, "exponent": exponent}
    return out


CELLS = [cell(n, g, seed) for n in (512, 4096) for g in GAMMAS for seed in (0, 1)]


def test_the_law_is_found_in_cells_that_follow_it():
    found = boundary.fit(CELLS)
    assert found.share == pytest.approx(0.2, rel=1e-6)
    assert found.spread < 1e-6
    assert [p["predicted"] for p in found.cells] == pytest.approx(
        [p["measured"] for p in found.cells], abs=1e-6
    )
    assert boundary.fit([]) is None


def test_the_crossing_lies_where_the_law_has_it():
    curve = boundary.width_crossing(CELLS, "1/L", level=1.0)
    want = [boundary.predicted_height(x, 8, 2.0**-x, 0.2) for x in (9, 12)]
    np.testing.assert_allclose(curve.mean, want, atol=0.02)
    np.testing.assert_array_equal(curve.low, curve.high)  # both seeds alike
    assert boundary.width_crossing(CELLS, "1%", level=5.0) is None


def test_time_breaks_even_where_the_degree_takes_as_long_as_the_exact_gradient():
    """Degree g takes 2^g ms, the exact gradient 2^4.5: up to degree 4 it pays."""
    times = [
        {
            "length": n,
            "best": "tiled",
            "exact": {"tiled": {"seconds": 2**4.5}},
            "degrees": {str(g): {"seconds": 2.0**g} for g in range(1, 9)},
        }
        for n in (512, 4096)
    ]
    clock = boundary.clock(times)
    slower = boundary.slowdown(clock, "1/L")
    for p in CELLS:
        degree = p["1/L"]["degree"]
        want = (degree - 4.5) * math.log(2) if degree <= 8 else math.inf
        assert slower(p) == pytest.approx(want)
    assert boundary.clock([]) is None


@pytest.mark.parametrize("cells", [[], CELLS[:1], CELLS])
def test_the_figure_draws_what_is_there(cells, monkeypatch):
    """No rows, one, or a map without times."""
    names = ("kind", "slice", "family", "length", "width", "gamma", "seed")
    rows = [
        {
            "point": {name: p[name] for name in names},
            "metrics": {name: x for name, x in p.items() if name not in names},
        }
        for p in cells
    ]
    figure = phase_boundary.draw(rows)
    figure.draw_without_rendering()
    first = figure.axes[0]
    assert bool([*first.lines, *first.collections]) == bool(cells)
    style.plt.close(figure)


def test_a_user_picks_the_fastest_that_meets_the_tolerance():
    """A factor by the nearest length that was run and the next norm, at its ratio to exact."""
    times = [
        {
            "length": n,
            "best": "tiled",
            "exact": {"tiled": {"seconds": 8.0}},
            "degrees": {"2": {"seconds": 4.0}, "5": {"seconds": 32.0}},
        }
        for n in (512, 4096)
    ]
    clock = boundary.clock(times)
    factors = [
        {
            "length": 4096,
            "gamma": gamma,
            "exact": {"seconds": 1.0},
            "factors": {"tree": {"seconds": 0.25, "error": error}},
        }
        for gamma, error in ((1.0, 0.005), (2.0, 0.5))
    ]

    def name(gamma, degree, length=4096):
        cell = {"length": length, "gamma": gamma, "1%": {"degree": degree}}
        return boundary.pick(clock, factors, cell, "1%").name

    assert name(0.5, 2) == name(1.0, 5) == name(1.0, None) == "tree"
    assert name(1.5, 2) == name(3.0, 2) == "2"
    assert name(1.5, 5) == name(3.0, None) == "exact"
    assert boundary.pick(clock, [], {"length": 512, "1%": {"degree": 2}}, "1%").name == "2"
