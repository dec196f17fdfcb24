"""`lora-limits diagnose`: a model folder and a text in, what to do and a verdict per head out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_limits import checklist
from lora_limits.checks import fail
from lora_limits.diagnose import adapters, loading, report, selection, summary, texts
from lora_limits.diagnose.diagnosis import Request, diagnose
from lora_limits.diagnose.longer import AtLength
from lora_limits.diagnose.task import Task, find_task
from lora_limits.instruments.progress import Progress


def diagnose_command(
    model: str,
    text: str,
    labels: str | None,
    adapter: str | None,
    tolerance: float,
    length: int | None,
    batch: int | None,
    layers: str | None,
    heads: str | None,
    table: bool,
    out: str | None,
) -> int:
    """Diagnoses the model in a folder on a text: prints what to do, in ten lines.

    out: a folder for JSON, a picture and a page; what is measured is there after each layer.
    Returns 0; 2, after one line on stderr, for a model, adapter or text that cannot be used as
    asked, where no head can be analysed, and where the extra `models` is missing.
    """
    others = [Path(path) if path else None for path in (labels, adapter, out)]
    try:
        with warnings.catch_warnings():
            # Those of the libraries, about their own future.
            warnings.simplefilter("ignore")
            _check(tolerance, batch, layers, heads)
            asked = Request(tolerance, layers=layers, heads=heads)
            diagnosis = _diagnose(Path(model), Path(text), others, (length, batch), asked)
            _show(diagnosis, others[2], table)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _check(tolerance: float, batch: int | None, layers: str | None, heads: str | None) -> None:
    """Raises ValueError for options that no model could make sense of."""
    if not 1e-3 <= tolerance < 1:
        fail("--tolerance", f"{tolerance:g}", "0.001 to 1, a relative error in float32")
    if batch is not None and batch < 1:
        fail("--batch", batch, "at least 1")
    selection.parse("--layers", layers)
    selection.parse("--heads", heads)


def _read(path: Path) -> str:
    """A text in UTF-8. A byte order mark would become a token, in silence."""
    with loading.one_line(str(path)):
        return path.read_text(encoding="utf-8-sig")


def _diagnose(
    folder: Path,
    text: Path,
    others: Sequence[Path | None],
    sizes: tuple[int | None, int | None],
    asked: Request,
) -> dict[str, Any]:
    """The diagnosis. others: labels, adapter, out; sizes: length, batch. What does not fit raises."""
    labels, adapter, out = others
    # What is quick to refuse is refused before the libraries are imported.
    loading.check_folder(folder)
    words = _read(text)
    classes = _read(labels).splitlines() if labels else None
    loading.require_extra()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        progress.stage("loading the model")
        bare = loading.load_model(folder)
        tokenizer = loading.load_tokenizer(folder)
        windows = _windows(bare, tokenizer, words, classes, sizes)
        task = find_task(bare, tokenizer, windows)
        base = adapters.check_base(adapter, bare, folder) if adapter else None
        adapted = adapters.load_adapter(bare, adapter) if adapter else adapters.random_adapter(bare)
        request = Request(
            asked.tolerance,
            model=folder.resolve().name,
            adapter=adapter.resolve().name if adapter else f"random, rank {adapters.RANK}",
            layers=asked.layers,
            heads=asked.heads,
            notes=(base,) if base else (),
            folder=out,
            at=None if classes else _at(bare, tokenizer, words),
            keep=(lambda diagnosis: report.save(diagnosis, out)) if out else None,
        )
        diagnosis = diagnose(adapted, windows, task, request, progress)
    _check_some(diagnosis)
    return diagnosis


def _windows(
    model: Any,
    tokenizer: Any,
    words: str,
    classes: list[str] | None,
    sizes: tuple[int | None, int | None],
) -> texts.Windows:
    length, batch = sizes
    if classes is None:
        return texts.windows(model, tokenizer, words, length=length, batch=batch)
    lines = words.splitlines()
    return texts.labelled(model, tokenizer, lines, classes, length=length, batch=batch)


def _at(model: Any, tokenizer: Any, words: str) -> AtLength:
    """One window of the text at any length, where the text is that long."""

    def at(length: int) -> tuple[texts.Windows, Task] | None:
        try:
            window = texts.windows(model, tokenizer, words, length=length, batch=1)
        except ValueError:
            return None
        return window, find_task(model, tokenizer, window)

    return at


def _check_some(diagnosis: dict[str, Any]) -> None:
    """Raises ValueError, with the reasons and what may help, where every head was refused."""
    reasons = [row["refused"] for row in diagnosis["heads"]]
    if not all(reasons):
        return
    often = max(set(reasons), key=reasons.count)
    help_ = (
        "a shorter --length, where windows of keys end" if "window" in often else "another model"
    )
    got = f"no head that can be analysed ({often}; {reasons.count(often)} of {len(reasons)} heads)"
    fail(diagnosis["model"], got, f"some; try {help_}")


def _show(diagnosis: dict[str, Any], out: Path | None, table: bool) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 80, highlight=False, markup=False)
    if table:
        console.print(report.table(diagnosis))
    for line in summary.summary(diagnosis):
        console.print(line, soft_wrap=True)
    if out is not None:
        from lora_limits.diagnose import page, picture

        results = report.save(diagnosis, out)
        drawn = picture.save(diagnosis, out / report.PICTURE)
        shown = page.save(diagnosis, drawn, out)
        console.print(f"Files    {shown}, {drawn.name}, {results.name}", soft_wrap=True)
    if table:
        console.print(f"\n{checklist.text()}", soft_wrap=True, end="")
