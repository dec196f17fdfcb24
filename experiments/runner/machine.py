"""What a run was made with: the commit, versions, and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_limits.instruments import cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "lora_limits")


def surroundings() -> dict[str, Any]:
    """The code and the machine behind a run: commit, whether anything differs from it, versions,
    device, processor, cores (all, and those this process may use), bytes of memory.

    The commit and `dirty` are None outside git; the device and x64 are None in a process that has
    not imported jax.
    """
    commit, dirty = _git()
    jax = sys.modules.get("jax")
    device = jax and jax.devices()[0]
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "device": device and {"platform": device.platform, "kind": device.device_kind},
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "usable_cpus": cores.usable(),
        "memory": _memory(),
        "system": platform.platform(),
        "x64": bool(jax.config.jax_enable_x64) if jax else None,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    """The model's name; on Linux the kernel knows it and `platform` does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or None)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _git() -> tuple[str | None, bool | None]:
    """The commit, None before the first, and whether the working tree differs from it; untracked
    files count.
    """
    # Without optional locks: a run that starts must not get in the way of a commit being made.
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None, None
    lines = done.stdout.splitlines()
    commit = next(
        (line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)"
    )
    return None if commit == "(initial)" else commit, any(
        not line.startswith("# ") for line in lines
    )
