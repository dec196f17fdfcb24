"""python -m paper_figures.gallery: write paper_figures/README.md, the results of README.md and
data/claims.json from the configs and kept rows.
"""

from __future__ import annotations

import sys

from experiments import Refused
from lora_limits.arguments import Parser
from paper_figures.gallery import claims, notes, page


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 for bad arguments or missing rows, after one line on stderr."""
    parser = Parser(prog="python -m paper_figures.gallery", description=__doc__)
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
            claims.write()
            print("README.md (results)", page.PATH.relative_to(page.HERE.parent))
    except (Refused, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
