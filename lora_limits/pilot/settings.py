"""What a pilot is asked to do, and the exact and approximate methods that it may use."""

from __future__ import annotations

import dataclasses
import math
import re

import jax

from lora_limits.checks import check_integer, check_number, fail
from lora_limits.factors.block_tree.method import BlockTree
from lora_limits.gradients.methods import Exact, Polynomial
from lora_limits.method import Method
from lora_limits.nn.lora import PROJECTIONS, HeadMethod, LoRA
from lora_limits.polynomial import monomials
from lora_limits.problem import NAMES

SHORT_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}
MOST_FEATURES = 2**16  # of a polynomial: an array of a block's fills gigabytes
DENSE = 2**30  # bytes of scores up to which the dense exact layouts are tried too


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of a pilot, the same for both of its sides.

    margin: by how much the approximate side may be worse, in accuracy (a share) or in loss (nats a
    token). method: of every layer; None: chosen layer by layer.
    Raises ValueError for numbers out of range, and targets without a projection of attention.
    """

    length: int
    batch: int = 4
    steps: int = 100
    seeds: int = 3
    rank: int = 4
    targets: tuple[str, ...] = ("query", "value")
    rate: float = 1e-3
    margin: float = 0.01
    method: str | None = None

    def __post_init__(self):
        least = {"length": 1, "batch": 1, "steps": 1, "seeds": 1, "rank": 1}
        for name, smallest in least.items():
            check_integer(f"--{name}", getattr(self, name), smallest)
        for name in ("rate", "margin"):
            if check_number(f"--{name}", getattr(self, name)) <= 0:
                fail(f"--{name}", getattr(self, name), "a number above 0")
        if not set(self.targets) & set(NAMES):
            # Methods approximate what flows through the scores, and what is weighed by them.
            fail("--targets", ",".join(self.targets), "at least one of q, k and v")

    @property
    def lora(self) -> LoRA:
        """Adapters of scale 2, as is usual."""
        return LoRA(self.rank, 2.0 * self.rank, adapt=self.targets)


def read_targets(text: str) -> tuple[str, ...]:
    """The projections in "q,v": short names, or those of the library.

    Raises ValueError for others.
    """
    names = [SHORT_NAMES.get(name.strip(), name.strip()) for name in text.split(",")]
    if set(names) - set(PROJECTIONS):
        fail("--targets", text, f"some of {', '.join((*SHORT_NAMES, *PROJECTIONS[4:]))}")
    return tuple(dict.fromkeys(names))


def approximate(length: int, *, causal: bool) -> dict[str, Method]:
    """The approximate methods that a layer is chosen from, by name."""
    names = ["polynomial 2", *([] if causal else ["block tree"])]
    return {name: read_method(name, length, causal=causal) for name in names}


def read_method(name: str, length: int, *, causal: bool) -> Method:
    """The method called "polynomial DEGREE" or "block tree", for sequences of that length.

    A polynomial computes blocks of a quarter of them exactly, a tree takes a quarter of the keys
    one by one and a quarter as samples, up to 1024 each. Raises ValueError for other names, and for
    a tree of a decoder.
    """
    quarter = -(-length // 4)
    words = name.replace("-", " ").split()
    if words == ["block", "tree"] and not causal:
        return BlockTree(near=min(quarter, 1024), samples=min(quarter, 1024))
    match = re.fullmatch(r"polynomial (\d+)", " ".join(words))
    if match is None:
        expected = "'polynomial DEGREE'" + ("" if causal else " or 'block tree'")
        fail("--method", repr(name), expected + (" for a decoder" if causal else ""))
    return Polynomial(int(match[1]), block_size=min(512, quarter))


def check_features(name: str, width: int) -> None:
    """Raises ValueError for a polynomial of more than MOST_FEATURES features at that width."""
    method = read_method(name, 1, causal=False)
    if isinstance(method, Polynomial):
        count = monomials.count(width, method.degree)
        if count > MOST_FEATURES:
            got = f"{name!r}, {count:,} features at heads of width {width}"
            fail("--method", got, f"at most {MOST_FEATURES:,}: a lower degree")


def exact(length: int, rows: int) -> dict[str, HeadMethod]:
    """Layouts of exact attention by name: tiled, and dense ones where their scores fit.

    rows: heads of a batch, each with a matrix of scores.
    """
    layouts: dict[str, HeadMethod] = {"exact in blocks of 512": Exact(512)}
    if 4 * rows * length**2 <= DENSE:
        layouts |= {"exact": Exact(), "jax.nn.dot_product_attention": dense}
    return layouts


def dense(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool) -> jax.Array:
    """JAX's own attention at full precision, with a backend's fused kernel where it has one."""
    with jax.default_matmul_precision("highest"):
        scale = 1 / math.sqrt(q.shape[-1])
        return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=is_causal)
