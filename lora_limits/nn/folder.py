"""A Hugging Face model's folder without torch: config.json and safetensors, put into our modules."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from safetensors import SafetensorError
from safetensors.flax import load_file

from lora_limits.checks import fail
from lora_limits.nn.layered import Layered
from lora_limits.nn.lora import LoRA, Norm, Projection, RMSNorm


class Layout(NamedTuple):
    """How a kind of model calls its parts: {ours: theirs}, theirs after "<layers>.N.".

    Of the files' names one may be longer by `prefix`, where a head lies on top of the model.
    """

    layers: str
    parts: Mapping[str, str]
    prefix: str

    def path(self, n: int, ours: str) -> str:
        """The file's name of a part of layer n."""
        return f"{self.layers}.{n}.{self.parts[ours]}"


class Pretrained(Layered):
    """A model whose layers have names in a file. nested: its file's names had the prefix."""

    layout: Layout
    task: str  # what PEFT calls what the model is for
    lora: LoRA
    nested: bool = False


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ValueError where it is absent or no object."""
    if not folder.is_dir():
        fail(folder, "no such folder", "a local Hugging Face model folder, downloaded beforehand")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise _unread(folder, error) from None
    if not isinstance(config, dict):
        fail(folder / "config.json", type(config).__name__, "an object")
    return config


def read_arrays(folder: Path, model: Pretrained) -> dict[str, Any]:
    """Arrays by their names without the prefix; notes in the model whether they had it.

    Raises ValueError for a folder without safetensors that can be read.
    """
    # Large models come in several files.
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        fail(folder, "no model.safetensors", "a model's folder")
    try:
        arrays = {name: array for file in files for name, array in load_file(file).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise _unread(folder, error) from None
    prefix = model.layout.prefix
    model.nested = any(name.startswith(prefix) for name in arrays)
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def _unread(folder: Path, error: Exception) -> ValueError:
    # The libraries' own traceback would say no more than its first line.
    return ValueError(f"{folder}: got {str(error).splitlines()[0]}, expected a model's folder")


def check(
    config: Mapping[str, Any], folder: Path, expected: Mapping[str, Any], needed: Iterable[str]
) -> None:
    """Raises ValueError unless the config has these values, where it names them, and these fields."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            fail(f"{folder}: {name}", repr(config[name]), repr(value))
    missing = sorted(set(needed) - config.keys())
    if missing:
        fail(f"{folder}: config.json", f"no {missing[0]}", "one")


def fill(module: Projection | Norm | RMSNorm, arrays: Mapping[str, Any], name: str) -> None:
    """Puts a layer of the file, called `name` there, into a module of ours."""
    weight, bias = (arrays.get(f"{name}.{part}") for part in ("weight", "bias"))
    if isinstance(module, Projection):
        # The file holds (out, in).
        put(module.kernel, None if weight is None else weight.T, name)
        shift = module.bias
    else:
        put(module.gain, weight, name)
        shift = module.shift if isinstance(module, Norm) else None
    if shift is not None:
        put(shift, bias, name)
    elif bias is not None:
        # It would be left out in silence.
        fail(name, "a bias", "none")


def put(param: Any, array: Any, name: str) -> None:
    """Puts an array of the file into a parameter of ours, in single precision."""
    if array is None or array.shape != param.shape:
        fail(name, "none" if array is None else f"shape {array.shape}", param.shape)
    param.set_value(jnp.asarray(array, jnp.float32))


def fill_blocks(model: Pretrained, arrays: Mapping[str, Any]) -> None:
    """Every part of every layer."""
    for n, block in enumerate(model.blocks):
        for ours in model.layout.parts:
            fill(part(block, ours), arrays, model.layout.path(n, ours))


def part(block: Any, ours: str) -> Any:
    """The module of a block by its dotted name."""
    return functools.reduce(getattr, ours.split("."), block)
