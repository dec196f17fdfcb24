"""SmolLM2-135M as a folder of safetensors, made once a session from its GGUF package."""

import functools
import os
import tempfile
from pathlib import Path

import pytest

from experiments.data.make_smollm2_heads import Failure, convert, package_folder


@functools.cache
def smollm2():
    """The folder. Skips without the packages, or fails under LORA_LIMITS_ALL_EXTRAS=1."""
    folder = Path(tempfile.mkdtemp(prefix="smollm2-"))
    try:
        convert(package_folder(), folder)
    except Failure as missing:
        if os.environ.get("LORA_LIMITS_ALL_EXTRAS") == "1":
            pytest.fail(f"LORA_LIMITS_ALL_EXTRAS=1, but {missing}")
        pytest.skip(str(missing))
    return folder
