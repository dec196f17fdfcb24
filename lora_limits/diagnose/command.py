"""`lora-limits diagnose`: a model folder and a text in, a verdict per head out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from lora_limits.checks import fail
from lora_limits.diagnose import adapters, loading, report
from lora_limits.diagnose.diagnosis import diagnose


def diagnose_command(
    model: str,
    text: str,
    adapter: str | None,
    tolerance: float,
    length: int | None,
    batch: int | None,
    out: str | None,
) -> int:
    """Diagnoses the model in a folder on a text: prints a table and the dials.

    out: a folder for JSON and a picture; what is measured is there after each layer.
    Returns 0; 2, after one line on stderr, for a model, adapter or text that cannot be used as
    asked, or where the extra `models` is missing.
    """
    numbers = (tolerance, length, batch)
    try:
        with warnings.catch_warnings():
            # Those of the libraries, about their own future.
            warnings.simplefilter("ignore")
            adapter_path, out_path = (Path(path) if path else None for path in (adapter, out))
            _diagnose(Path(model), Path(text), adapter_path, numbers, out_path)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _diagnose(
    folder: Path,
    text: Path,
    adapter: Path | None,
    numbers: tuple[float, int | None, int | None],
    out: Path | None,
) -> None:
    """As diagnose_command, numbers its (tolerance, length, batch); what does not fit raises."""
    tolerance, length, batch = numbers
    if not 1e-3 <= tolerance < 1:
        fail("--tolerance", f"{tolerance:g}", "0.001 to 1, a relative error in float32")
    if batch is not None and batch < 1:
        fail("--batch", batch, "at least 1")
    # What is quick to refuse is refused before the libraries are imported.
    loading.check_folder(folder)
    with loading.one_line(str(text)):
        # A byte order mark would become a token, in silence.
        words = text.read_text(encoding="utf-8-sig")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    bare = loading.load_model(folder)
    ids = loading.windows(bare, loading.load_tokenizer(folder), words, length=length, batch=batch)
    adapted = adapters.load_adapter(bare, adapter) if adapter else adapters.random_adapter(bare)
    told = adapter.name if adapter else f"random, rank {adapters.RANK}"
    keep = (lambda diagnosis: report.save(diagnosis, out)) if out else None
    diagnosis = diagnose(
        adapted, ids, tolerance=tolerance, model=folder.resolve().name, adapter=told, keep=keep
    )
    _show(diagnosis, out)


def _show(diagnosis: dict[str, Any], out: Path | None) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.table(diagnosis))
    for line in report.words(diagnosis):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        from lora_limits.diagnose import picture

        results = report.save(diagnosis, out)
        drawn = picture.save(diagnosis, out / report.PICTURE)
        console.print(f"results: {results}, {drawn}")
