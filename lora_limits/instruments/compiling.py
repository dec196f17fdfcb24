"""Quick compilation, for programs whose values are wanted once; and room for more programs.

A fifth of the compile time, code half as fast or slower, same buffers: never for what is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

# Only for the CPU: other backends know other options and are left as they are.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if tuple(int(n) for n in version("jaxlib").split(".")[:2]) < (0, 11):
    # Half the compile time; later versions abort at its name.
    QUICK["xla_cpu_use_fusion_emitters"] = False


def quick_jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """jax.jit with little optimisation. options: those of jax.jit."""
    quick: dict[str, Any] | None = dict(QUICK) if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick, **options)


# Up to so many tokens, and tokens times numbers of a model, what is run a few times costs more to
# compile well than it gains by it.
SHORT = 1024
FEW = 1e9


def jit_for(function: Callable[..., Any], length: int, params: Any) -> Callable[..., Any]:
    """The function of (graphdef, *arguments), compiled quickly where a model with these parameters
    does little on so many tokens; once in a process either way.
    """
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    return _jitted(function, length <= SHORT and length * numbers <= FEW)


@functools.cache
def _jitted(function: Callable[..., Any], quick: bool) -> Callable[..., Any]:
    # Made at its first use: quick_jit asks which backend there is, which no import should start.
    return (quick_jit if quick else jax.jit)(function, static_argnums=0)


def make_room(process: Path = Path("/proc/self"), system: Path = Path("/proc/sys")) -> bool:
    """Forgets all compiled programs once half of the memory maps that Linux gives a process are
    taken; whether it did.

    Every program takes a few, for as long as it is kept, and where none are left the next to be
    compiled ends the process. Nothing is done where there are no such files.
    """
    try:
        most = int((system / "vm" / "max_map_count").read_text())
        with (process / "maps").open(encoding="utf-8") as maps:
            taken = sum(1 for _ in maps)
    except OSError:
        return False
    if taken <= most / 2:
        return False
    jax.clear_caches()
    return True
