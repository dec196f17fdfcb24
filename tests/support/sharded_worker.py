"""One process of test_sharded.py: sharded gradients on the devices it sees, held against
`gradient`; prints JSON.

python sharded_worker.py '{"cases": [...], "processes": 1, "index": 0, "port": 0}'; a case is
{"adapt": names,
"series", "degree", "mesh": {"axis": size, ...}, "place": "numpy" | "auto" | "explicit"}, "place"
saying how the problem lies before the call.
"""

import hashlib
import json
import os
import re
import sys

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_limits as ll
from experiments.problems import conditioned as problems
from tests.support.tools import arrays, quick_jit

# more keys than the frame samples, fewer queries; no block divides what a device holds
SHAPE = problems.Shape(lq=48, lk=336, inputs=(3, 5, 4), width=3, value_width=2, rank=2)
COLLECTIVE = re.compile(r" = (.*?) ((?:all|collective|reduce-scatter|ragged)[a-z-]*)\(")


def build(adapt, kind="outlier tokens"):
    """The same problem in every process."""
    return problems.make(7, shape=SHAPE, adapt=adapt, kind=kind)


def collectives(text):
    """[(operation, numbers)] of a compiled program: all that devices tell each other in it."""
    out = []
    for result, operation in COLLECTIVE.findall(text):
        shapes = [
            s
            for s in re.findall(r"[a-z]+\d+\[([\d,]*)\]", result)
            if not operation.endswith("-done")
        ]
        out.append(
            (operation, sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes))
        )
    return out


def placed(problem, mesh):
    """The problem as global arrays, of which every process makes its own part."""
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    fields = {n: getattr(problem, n) for n in ("x_query", "x_key", "x_value", "target")}
    tokens = {
        n: jax.make_array_from_callback(x.shape, split, lambda i, x=x: x[i])
        for n, x in fields.items()
    }
    return ll.LoRAProblem(
        **tokens,
        weights=problem.weights,
        adapters=problem.adapters,
        scale=problem.scale,
        beta=problem.beta,
    )


def measured(case):
    """What one case gave, relative to `gradient` on one device; of all processes but the first, a
    digest alone.
    """
    problem = build(tuple(case["adapt"]))
    method = ll.Polynomial(case["degree"], case["series"], block_size=5)
    kind = AxisType.Explicit if case["place"] == "explicit" else AxisType.Auto
    mesh = jax.make_mesh(
        tuple(case["mesh"].values()), tuple(case["mesh"]), axis_types=(kind,) * len(case["mesh"])
    )
    given = problem if case["place"] == "numpy" else placed(problem, mesh)
    lowered = quick_jit(ll.sharded_gradient, static_argnums=(1, 2)).lower(given, method, mesh)
    compiled = lowered.compile()
    got = compiled(given)
    digest = hashlib.sha256(
        b"".join(x.tobytes() for x in arrays(got.gradient).values())
    ).hexdigest()
    if jax.process_index():
        return {"digest": digest}
    want = quick_jit(ll.gradient, static_argnums=1)(problem, method)

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return (
            float(np.abs(a - b).max() / np.abs(b).max())
            if np.isfinite(b).all()
            else float((a != b).any())
        )

    top = max(np.abs(x).max() for x in arrays(want.gradient).values())
    pairs = {n: (x, arrays(want.gradient)[n]) for n, x in arrays(got.gradient).items()}
    return {
        "digest": digest,
        "gradient": max(float(np.abs(a - b).max()) / top for a, b in pairs.values()),
        "loss": error(got.loss, want.loss),
        "bound": max(error(x, arrays(want.bound)[n]) for n, x in arrays(got.bound).items()),
        "finite": bool(np.isfinite(list(arrays(want.bound).values())).all()),
        "normaliser": error(got.normaliser, want.normaliser),
        "rank": got.rank == want.rank,
        "replicated": all(x.is_fully_replicated for x in jax.tree.leaves(got)),
        "collectives": collectives(compiled.as_text()),
    }


def main(spec):
    """Joins the other processes, if there are any, and measures every case."""
    if spec["processes"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{spec['port']}", spec["processes"], spec["index"], initialization_timeout=60
        )
    report = {"devices": jax.device_count(), "processes": jax.process_count()}
    report["cases"] = [measured(case) for case in spec["cases"]]
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    assert "xla_force_host_platform_device_count" in os.environ["XLA_FLAGS"]
    main(json.loads(sys.argv[1]))
