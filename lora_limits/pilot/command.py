"""`lora-limits pilot`: a model folder and a text in, go or no-go out."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

from lora_limits.checks import fail

NEEDED = {"tokenizers": "tokenizers", "orbax": "orbax-checkpoint"}


def pilot_command(
    model: str,
    text: str,
    labels: str | None,
    method: str | None,
    steps: int,
    seeds: int,
    length: int | None,
    batch: int,
    rank: int,
    targets: str,
    rate: float,
    margin: float,
    out: str,
) -> int:
    """Fine-tunes the model in a folder twice and says which to use.

    out: where results are kept as they come; the same command goes on from there.
    Returns 0 whatever the verdict; 2, after one line on stderr, for a model or text that cannot be
    used as asked, a folder of another pilot, or where the extra `pilot` is missing.
    """
    sizes = {"steps": steps, "seeds": seeds, "batch": batch, "rank": rank}
    numbers: dict[str, Any] = {**sizes, "rate": rate, "margin": margin, "method": method}
    try:
        with warnings.catch_warnings():
            # Those of the libraries, about their own future.
            warnings.simplefilter("ignore")
            where = (Path(model), Path(text), Path(labels) if labels else None, Path(out))
            _pilot(*where, length, targets, numbers)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _pilot(
    folder: Path,
    text: Path,
    labels: Path | None,
    out: Path,
    length: int | None,
    targets: str,
    numbers: dict[str, Any],
) -> None:
    """As pilot_command; what does not fit raises."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        packages = ", ".join(NEEDED[name] for name in missing)
        fail("packages", f"no {packages}", "pip install 'lora-limits[pilot]'")
    # After what is quick to refuse: JAX takes seconds to import.
    from lora_limits.instruments.progress import Progress
    from lora_limits.pilot import models, report, texts
    from lora_limits.pilot.course import Pilot
    from lora_limits.pilot.settings import Settings, read_targets
    from lora_limits.training.loop import EXACT

    words = texts.read(text)
    task = _task(folder, words, labels, length)
    settings = Settings(length=task.length, targets=read_targets(targets), **numbers)
    asked = {
        "model": folder.resolve().name,
        "text": hashlib.sha256(words.encode()).hexdigest()[:16],
        **vars(settings),
    }
    classes = None if task.classes is None else len(task.classes)
    load = functools.partial(models.load, folder, settings.lora, classes, EXACT)
    with Progress() as progress:
        progress.stage("reading the model")
        state = Pilot(load, task, settings, asked, out, progress.at).run()
    print("\n".join(report.lines(state, settings)))
    kept = [out / "pilot.json"]
    if "runs" in state:
        from lora_limits.pilot import picture

        kept += [picture.save(state, out), out / "adapters"]
    print("results:", ", ".join(str(path) for path in kept))


def _task(folder: Path, words: str, labels: Path | None, length: int | None) -> Any:
    """The task of the model's kind, cut into sequences."""
    from lora_limits.nn import folder as folders
    from lora_limits.nn import pretrained
    from lora_limits.pilot import texts

    packed = next(folder.glob("*.gguf"), None)
    if packed is not None and not (folder / "config.json").is_file():
        how = f"from_pretrained(DIR, gguf_file={packed.name!r}).save_pretrained(OTHER_DIR)"
        fail(folder, packed.name, f"safetensors, as transformers' {how} writes them, tokenizer too")
    config = folders.read_config(folder)
    kind = config.get("model_type")
    if kind not in pretrained.KINDS:
        fail(f"{folder}: model_type", repr(kind), f"one of {list(pretrained.KINDS)}")
    most = config.get("max_position_embeddings")
    if not isinstance(most, int):
        fail(f"{folder}: max_position_embeddings", repr(most), "an integer")
    if length is not None and not texts.SHORTEST <= length <= most:
        fail("--length", length, f"{texts.SHORTEST} to {most}, the model's positions")
    tokenizer = texts.tokenizer(folder)
    if kind == "llama":
        if labels is not None:
            fail("--labels", str(labels), "none: a decoder learns to predict the next token")
        ids = tokenizer.encode(words, add_special_tokens=False).ids
        return texts.language(ids, length, most)
    if labels is None:
        fail(
            "--labels", "none", "a file of classes, one for each line of --text: this is an encoder"
        )
    task = texts.classes(
        tokenizer, words.splitlines(), texts.read(labels).splitlines(), length, most
    )
    if task.left_out:
        total = len(words.splitlines())
        print(f"{task.left_out} of {total} lines are shorter than {task.length} tokens: left out")
    return task
