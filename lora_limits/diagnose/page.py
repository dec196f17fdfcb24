"""A diagnosis as one HTML page that needs no other file: what to do, the picture, every head."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from lora_limits.diagnose import report
from lora_limits.diagnose.summary import headline, summary

FILE = "diagnosis.html"
STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 58rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: 0.6rem } h2 { font-size: 1.1rem; margin-top: 2rem }
dl { display: grid; grid-template-columns: 6rem 1fr; gap: 0.25rem 1rem } dt { color: #666 }
dd { margin: 0 } img { width: 100%; border: 1px solid #ddd } li { margin: 0.3rem 0 }
table { border-collapse: collapse; font-size: 0.85rem; width: 100% }
th { text-align: left; border-bottom: 1px solid #888 } td, th { padding: 0.2rem 0.6rem 0.2rem 0 }
tr.now { background: #d5e6f3 } tr.later { background: #eef5fa } tr.never { background: #fbf3df }
td { vertical-align: top; border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums }
"""


def _rows(diagnosis: dict[str, Any]) -> str:
    out = []
    for row in diagnosis["heads"]:
        kind = "refused" if row["refused"] else row["verdict"]
        cells = report.cells(row, diagnosis["tolerance"])
        out.append(f'<tr class="{kind}">' + "".join(f"<td>{html.escape(c)}</td>" for c in cells))
    return "\n".join(out)


def page(diagnosis: dict[str, Any], picture: bytes) -> str:
    """The page, as text. picture: a PNG."""
    title = html.escape(headline(diagnosis))
    lines = [line.partition(" ") for line in summary(diagnosis)[1:]]
    facts = "\n".join(f"<dt>{a}</dt><dd>{html.escape(b.strip())}</dd>" for a, _, b in lines)
    told = "\n".join(f"<li>{html.escape(line)}</li>" for line in report.words(diagnosis))
    names = "".join(f"<th>{html.escape(name)}</th>" for name in report.COLUMNS)
    drawn = base64.b64encode(picture).decode("ascii")
    # "</script>" in a name would end the data.
    data = json.dumps(report.finite(diagnosis), allow_nan=False).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<dl>
{facts}
</dl>
<img alt="Which heads would gain, how large their scores are, and three dials"
 src="data:image/png;base64,{drawn}">
<h2>In words</h2>
<ul>
{told}
</ul>
<h2>Every head</h2>
<table>
<thead><tr>{names}</tr></thead>
<tbody>
{_rows(diagnosis)}
</tbody>
</table>
<script type="application/json" id="diagnosis">{data}</script>
</body>
</html>
"""


def save(diagnosis: dict[str, Any], picture: Path, out: Path) -> Path:
    """Writes out/diagnosis.html. picture: the PNG that goes into it."""
    path = out / FILE
    path.write_text(page(diagnosis, picture.read_bytes()), encoding="utf-8")
    return path
