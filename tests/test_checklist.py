"""The checklist's thresholds and numbers are those of the code and of the kept results."""

import math
import re

import pytest

from lora_limits import checklist
from lora_limits.cli import COMMANDS
from lora_limits.pilot import choosing, outcome
from lora_limits.pilot.settings import Settings
from paper_figures.gallery import page
from tests.support import ROOT

PAGE = " ".join(checklist.text().split())


def test_it_is_one_page_of_80_columns():
    lines = checklist.text().splitlines()
    assert len(lines) <= 66
    assert max(map(len, lines)) <= 80


def test_thresholds_are_those_of_the_pilot():
    assert f"error is at most {choosing.SHARE:g} of the noise" in PAGE
    assert f"whole gradient is {outcome.STOP:g} times the noise" in PAGE
    assert f"the {100 * outcome.LEVEL:.0f} % interval" in PAGE
    assert f"({Settings(16).margin:g} of accuracy" in PAGE
    for degree, said in ((2, "2,145"), (4, "814,385")):
        assert f"{math.comb(64 + degree, degree):,}" == said
        assert said in PAGE


@pytest.mark.parametrize(
    ("said", "result"),
    [
        ("0.15 of exact's speed at 2,048 tokens", "`BlockTree` of width 256 over the best exact gradient, head width 32 | 0.15 ± 0.05 times at L = 2048"),
        ("and 1.26 at 16,384", "1.26 ± 0.07 times at L = 16384"),
        ("gain nothing at 512 tokens", "short sequences: L = 512, two adapters | 1.00 ±"),
        ("and 28 times at 16,384", "28.4 ± 0.4 times"),
        ("between 16,384 and 32,768 tokens", "between L = 16,384 and 32,768"),
        ("0.852 of exact's speed at 2,048", "2,048: polynomial 2 (3 seeds) | a step 0.852 ± 0.013 times as fast"),
        ("and 2.49 at 8,192", "8,192: polynomial 2 (one seed) | a step 2.4927 ± 0.0024 times as fast"),
        ("learns nothing of use at either", "2,048: polynomial 2 (3 seeds) | a step 0.852 ± 0.013 times as fast, held-out loss worse by 0.26"),
        ("0.43 for uniform inputs and 0.089 in the worst case", "uniform 0.43 (L = 2^16), gadget 0.089"),
        ("at 1.3 and 0.27 (1 %)", "uniform 1.3 (L = 2^16), gadget 0.27"),
        ("all 24 heads of an encoder", "1.5 to 5.1, 24 above 1"),
        ("all 28 of a decoder", "2.0 to 6.2, 28 above 1"),
        ("58,905 for the tamest of those heads at 10 %, 3.5e8 in the median", "58,905 for the tamest, 3.5e8 the median"),
        ("0.017 to 0.080 from 2,048", "L = 16384: median error (90 %) | 0.080 (0.33) query"),
        ("0.017 to 0.080 from 2,048", "L = 2048: median error (90 %) | 0.017 (0.038) query"),
        ("cost 0.012 ± 0.017 in loss where", "0.012 ± 0.017 normalised (27 kinds of run)"),
        ("0.18 ± 0.13 where norms", "0.18 ± 0.13 shrunk (3 kinds of run)"),
        ("above it 0.53 ± 0.10", "0.53 ± 0.10 all (39 kinds of run)"),
        ("at rate 0.001 R passed ln L after 120 to 180 steps", "step 120 to 180 at rate 0.001"),
        ("at 0.0003 never", "never at rate 0.0003"),
    ],
)  # fmt: skip
def test_numbers_are_those_of_the_gallery(said, result):
    assert said in PAGE
    assert result in page.PATH.read_text(encoding="utf-8")


def test_commands_and_rows_that_it_names_are_there():
    named = re.findall(r"`lora-limits (\w+)([^`]*)`", PAGE)
    assert {command for command, _ in named} == {"diagnose", "pilot"}
    for command, rest in named:
        assert set(re.findall(r"--\w+", rest)) <= COMMANDS[command][3].keys()
    rows = set(re.findall(r"`([a-z_]+)`", PAGE))
    assert rows <= {path.stem for path in (ROOT / "configs").glob("*.toml")}


def test_the_gallery_links_it():
    assert "(../lora_limits/checklist.md)" in page.PATH.read_text(encoding="utf-8")
