"""Results folders made of the rows that are kept, as a sweep would have left them."""

import json
from pathlib import Path

from experiments.runner import store
from paper_figures.command.finding import STORED, load

FIELDS = {"degree": 3}


def folder(path, name, *, rows=None, failed=(), planned=None, **told):
    """A results folder of a config: these of its kept rows (all unless said), and a manifest that
    plans all.
    """
    whole = load(STORED, name)
    path = Path(path)
    path.mkdir(parents=True)
    keys = [row["key"] for row in (whole if rows is None else rows)]
    lines = []
    for row in whole:
        row = row | {"fields": told.get("fields", FIELDS), "run": "one"}
        if row["key"] in failed:
            row = {n: x for n, x in row.items() if n != "metrics"} | {
                "status": "failed",
                "error": {"type": "MemoryError", "message": "too much"},
            }
        if row["key"] in keys:
            lines.append(json.dumps(store.encode(row)))
    (path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    manifest = {
        "name": name,
        "experiment": name,
        "version": whole[0]["version"],
        "fields": FIELDS,
        "size": "full",
        "config": {},
        "run": "one",
        "argv": [f"configs/{name}.toml", "--out", str(path)],
        "started": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "planned": {row["key"]: row["point"] for row in whole} if planned is None else planned,
        "runs": [],
    }
    (path / "manifest.json").write_text(json.dumps(manifest | told))
    return path
