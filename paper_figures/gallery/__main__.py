"""python -m paper_figures.gallery: write paper_figures/README.md from the configs and kept rows."""

from __future__ import annotations

import argparse
import sys

from experiments import Refused
from paper_figures.gallery import notes, page


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 for bad arguments or missing rows, after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.gallery", description=__doc__)
    parser.add_argument(
        "--minutes",
        nargs="+",
        metavar="CONFIG",
        help="write nothing, but say how long these configs take at default size",
    )
    args = parser.parse_args(argv)
    try:
        if args.minutes:
            print(notes.how_long(args.minutes))
        else:
            page.PATH.write_text(page.text(), encoding="utf-8")
            print(page.PATH.relative_to(page.HERE.parent))
    except (Refused, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
