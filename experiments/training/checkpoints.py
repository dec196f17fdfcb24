"""Arrays and a history on disk, by orbax: kept whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax


def _manager(folder: Path):
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
    )


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their place: whatever the tree is made of, orbax sees one flat
    dictionary.
    """
    return {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(tree))}


def keep(folder: Path | None, step: int, tree: Any, history: dict[str, Any]) -> None:
    """Keep the arrays of a tree and a JSON history as of `step`, in place of what was kept before;
    None: nowhere.
    """
    import orbax.checkpoint as ocp

    if folder is not None:
        with _manager(folder) as manager:
            if step != manager.latest_step():
                arrays = ocp.args.StandardSave(_named(tree))
                manager.save(
                    step, args=ocp.args.Composite(arrays=arrays, history=ocp.args.JsonSave(history))
                )


def restore(
    folder: Path | None, tree: Any, history: dict[str, Any]
) -> tuple[int, Any, dict[str, Any]]:
    """(step, tree, history) as kept last; where nothing was, 0 and what was passed in. Shapes must
    be the tree's.
    """
    if folder is None or not folder.exists():
        return 0, tree, history
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return 0, tree, history
        wanted = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(_named(tree)), history=ocp.args.JsonRestore()
        )
        found: Any = manager.restore(step, args=wanted)
    leaves = [found.arrays[str(n)] for n in range(len(found.arrays))]
    return step, jax.tree.unflatten(jax.tree.structure(tree), leaves), found.history


def publish(folder: Path, tree: Any) -> None:
    """Keep a tree in a folder that appears whole or not at all; if it is there already, it stays as
    it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        keep(made, 0, tree, {})
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(made)
