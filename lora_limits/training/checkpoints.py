"""Arrays and a history on disk, by orbax: kept whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def _manager(folder: Path) -> ocp.CheckpointManager:
    # Synchronous: what is kept is on disk before the run goes on.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _numbered(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their place: whatever it is made of, orbax sees a flat dictionary."""
    return {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(tree))}


def keep(folder: Path | None, step: int, tree: Any, history: dict[str, Any]) -> None:
    """Keeps the arrays of a tree and a JSON history as of `step`, in place of what was kept before.

    folder None: nothing is kept.
    """
    if folder is None:
        return
    with _manager(folder) as manager:
        # A run that is resumed comes by the step that it was kept at once more.
        if step != manager.latest_step():
            arrays = ocp.args.StandardSave(_numbered(tree))
            told = ocp.args.JsonSave(history)
            manager.save(step, args=ocp.args.Composite(arrays=arrays, history=told))


def restore(
    folder: Path | None, tree: Any, history: dict[str, Any]
) -> tuple[int, Any, dict[str, Any]]:
    """(step, tree, history) as kept last; where nothing was, 0 and what was passed in.

    Shapes must be the tree's.
    """
    if folder is None or not folder.exists():
        return 0, tree, history
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return 0, tree, history
        arrays = ocp.args.StandardRestore(_numbered(tree))
        wanted = ocp.args.Composite(arrays=arrays, history=ocp.args.JsonRestore())
        found: Any = manager.restore(step, args=wanted)
    leaves = [found.arrays[str(n)] for n in range(len(found.arrays))]
    return step, jax.tree.unflatten(jax.tree.structure(tree), leaves), found.history


def publish(folder: Path, tree: Any) -> None:
    """Keeps a tree in a folder that appears whole or not at all.

    If it is there already, it stays as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the rename stays on one file system.
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        keep(made, 0, tree, {})
        made.rename(folder)
    except OSError:
        # Another process was first: its folder holds the same.
        if not folder.exists():
            raise
        shutil.rmtree(made)


def forget(folder: Path) -> None:
    """Drops what was kept of a run that is over."""
    shutil.rmtree(folder, ignore_errors=True)
