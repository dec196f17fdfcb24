"""What the tests share: references, problems on purpose, and where the checkout is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
