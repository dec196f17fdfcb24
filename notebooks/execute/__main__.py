"""python -m notebooks.execute [SOURCE.py ...]: run notebooks and write each .ipynb beside its source.

Without names, all of them, in two or three minutes. Needs the extra `notebooks`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1]


def sources() -> list[Path]:
    """The notebooks there are, as percent scripts."""
    return sorted(FOLDER.glob("*.py"))


def merged(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell, with what it prints in one piece: a kernel sends it in as many as it
    likes, another time in others.
    """
    out: list[Any] = []
    for output in outputs:
        stream = output["output_type"] == "stream"
        if stream and out and out[-1].get("name") == output["name"]:
            out[-1]["text"] += output["text"]
        else:
            out.append(output)
    return out


def execute(source: Path) -> Path:
    """Runs a percent script from top to bottom as a notebook; returns the .ipynb it wrote.

    The same source gives the same file on the same machine: no times, no random names of cells.
    Raises what a cell raises, and ValueError for an output that names a folder of this machine.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem[:2]}-{number:02d}"
    where = {"metadata": {"path": str(source.parent)}}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources=where
    )
    client.execute()
    for cell in notebook.cells:
        if cell["cell_type"] == "code":
            cell["outputs"] = merged(cell["outputs"])
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["language_info"] = {"name": "python"}
    written = nbformat.writes(notebook)
    for folder in (FOLDER.parent, Path.home(), Path(sys.prefix)):
        if f"{folder}/" in written:
            raise ValueError(
                f"{source.name}: an output names {folder}, expected none of this machine"
            )
    target = source.with_suffix(".ipynb")
    target.write_text(written + "\n", encoding="utf-8")
    return target


def main(names: list[str]) -> int:
    """Exit status: 0; 2 for a source that is not there."""
    for source in [Path(name) for name in names] or sources():
        if not source.is_file():
            known = ", ".join(path.name for path in sources())
            print(f"error: notebook: got {source}, expected one of {known}", file=sys.stderr)
            return 2
        target = execute(source.resolve())
        print(f"{target.relative_to(FOLDER.parent)}: {target.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
