"""Quick compilation, for programs whose values are wanted once.

A fifth of the compile time, slower code, same buffers: never for what is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
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
