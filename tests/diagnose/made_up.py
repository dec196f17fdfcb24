"""A layer as a survey would leave it, drawn at random: heads to be analysed without a model."""

import numpy as np

from lora_limits.diagnose.layers import NAMES, Layer, Mask
from lora_limits.diagnose.projections import Projection
from lora_limits.instruments.comparing import softmax

LENGTH, D_MODEL, HEADS, GROUPS, WIDTH, RANK = 24, 10, 4, 2, 3, 2
FULL, CAUSAL = Mask(), Mask(None, 0)


def recording(*, factor=1.0, mask=FULL, turn=None, adapted=NAMES, scale=0.5, residual=False):
    """A layer as a survey would leave it, four heads on two key heads, and its projections."""
    random = np.random.default_rng(0)
    x = random.standard_normal((LENGTH, D_MODEL)).astype(np.float32)
    whole, rows = {}, {}
    for name in NAMES:
        count = HEADS if name == "query" else GROUPS
        shapes = (
            (D_MODEL, count * WIDTH),
            (count * WIDTH,),
            (D_MODEL, RANK),
            (RANK, count * WIDTH),
        )
        w, bias, b, a = (random.standard_normal(s).astype(np.float32) for s in shapes)
        b, a = (b, a) if name in adapted else (None, None)
        whole[name] = Projection(w, bias, b, a, scale)
        y = x @ w + bias + (0 if b is None else scale * x @ b @ a)
        rows[name] = y.reshape(LENGTH, count, WIDTH).transpose(1, 0, 2)
    rows["query"] = factor * rows["query"]
    if turn is not None:
        rows |= {n: np.stack([turn(head) for head in rows[n]]) for n in ("query", "key")}
    scores = 0.4 * rows["query"] @ np.repeat(rows["key"], HEADS // GROUPS, 0).transpose(0, 2, 1)
    seen = mask.visible(np.arange(LENGTH), LENGTH)
    f = softmax(np.where(seen[None], scores, -1e30))
    output = f @ np.repeat(rows["value"], HEADS // GROUPS, 0)
    told = random.standard_normal(output.shape) if residual else ()
    layer = Layer(
        HEADS,
        GROUPS,
        0.4,
        mask,
        dict.fromkeys(NAMES, x),
        **{n: dict(enumerate(rows[n])) for n in NAMES},
        residual=dict(enumerate(told)),
        output=output.transpose(1, 0, 2).reshape(LENGTH, -1),
    )
    return layer, whole


def rotated(rows):
    """Rotary positions of two of three coordinates, neighbours."""
    angle = np.arange(LENGTH) * 0.3
    u, v, rest = rows.T
    return np.stack(
        [np.cos(angle) * u - np.sin(angle) * v, np.sin(angle) * u + np.cos(angle) * v, rest], 1
    )


def normalised(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
