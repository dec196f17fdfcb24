"""The gradient over a mesh: the same to rounding, O(k d) bytes whatever L is, one n-th of the work
on each device.

The session has one device, so meshes are run in processes of their own, and what only needs
counting is counted on meshes without devices.
"""

import functools
import itertools
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

import lora_limits as ll
from experiments.problems import conditioned as problems
from lora_limits.instruments.counting import count_operations
from lora_limits.polynomial import monomials
from tests.support import ROOT

TIMEOUT = 240
WIDTH, RANK = 8, 4
WORDS = ("psum", "pmax", "pmin")
EIGHT = {"tokens": 8}


def case(adapt, series, degree, mesh, place):
    return {"adapt": adapt, "series": series, "degree": degree, "mesh": mesh, "place": place}


def run(cases, devices, processes=1):
    """What `processes` workers of `devices` devices each print. All end with the test, whatever
    happens.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    started, out = [], []
    try:
        for index in range(processes):
            spec = json.dumps(
                {"cases": cases, "processes": processes, "index": index, "port": port}
            )
            command = [sys.executable, str(ROOT / "tests" / "support" / "sharded_worker.py"), spec]
            started.append(
                subprocess.Popen(
                    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        for process in started:
            text, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors[-4000:]
            out.append(json.loads(text.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return out


def check(report, cases):
    """The same gradient, loss, bound and normaliser to rounding; nothing but all-reduces of the
    counted size.
    """
    for asked, got in zip(cases, report["cases"], strict=True):
        assert got["gradient"] < 1e-12, asked
        assert got["loss"] < 1e-12, asked
        # the bound counts one rounding more for each device
        assert got["finite"], asked
        assert got["bound"] < 1e-8, asked
        assert got["normaliser"] < 1e-10, asked
        assert got["rank"], asked
        assert got["replicated"], asked
        assert {operation for operation, _ in got["collectives"]} == {"all-reduce"}, asked


# ---------------------------------------------------------------------------------------------------- the same result


def every(adapt):
    """Every series, degrees 0, 2 and 3, both kinds of mesh and inputs on neither."""
    methods = (("taylor", 2), ("taylor", 3), ("fitted", 2), ("fitted", 3), ("chebyshev", 0))
    places = itertools.cycle(("numpy", "auto", "explicit"))
    return [case(adapt, series, degree, EIGHT, next(places)) for series, degree in methods]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            [case(problems.PARTIAL, "fitted", 2, {"hosts": 2, "tokens": 4}, "explicit")], id="one"
        ),
        pytest.param(every(problems.PARTIAL), id="partial", marks=pytest.mark.slow),
        pytest.param(every(problems.FULL), id="full", marks=pytest.mark.slow),
        pytest.param(every(("key",)), id="key", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_in_one_process(cases):
    (report,) = run(cases, devices=8)
    assert report["devices"] == 8
    check(report, cases)
    # read off the compiled program, and counted: the same numbers
    for asked, got in zip(cases, report["cases"], strict=True):
        p = specification_of_worker(asked["adapt"])
        method = ll.Polynomial(asked["degree"], asked["series"])
        sizes = tuple(asked["mesh"].values())
        counted = traffic(p, method, AbstractMesh(sizes, tuple(asked["mesh"])))
        assert sum(n for _, n in got["collectives"]) == sum(n for _, n in counted), asked
        assert len(got["collectives"]) <= len(counted) <= 16, asked


@pytest.mark.slow
def test_two_processes_on_the_loopback_address():
    cases = [
        case(problems.PARTIAL, "taylor", 2, {"tokens": 4}, "auto"),
        case(problems.FULL, "fitted", 3, {"tokens": 4}, "explicit"),
        case(("key",), "taylor", 1, {"hosts": 2, "tokens": 2}, "numpy"),
    ]
    first, second = run(cases, devices=2, processes=2)
    for report in (first, second):
        assert (report["devices"], report["processes"]) == (4, 2)
    check(first, cases)
    assert [c["digest"] for c in second["cases"]] == [c["digest"] for c in first["cases"]]


# ------------------------------------------------------------------------------------------------------- what is said


def specification(length, adapt=problems.PARTIAL, shape=None):
    """A problem of shapes without numbers, all widths equal to WIDTH unless a problems.Shape says
    otherwise.
    """
    s = shape or problems.Shape(length, length, (WIDTH,) * 3, WIDTH, WIDTH, RANK)
    widths = dict(zip(problems.FULL, s.inputs, strict=True))
    out = {"query": s.width, "key": s.width, "value": s.value_width}

    def array(*sizes):
        return jax.ShapeDtypeStruct(sizes, np.float64 if shape else np.float32)

    return ll.LoRAProblem(
        *(array(n, widths[name]) for name, n in (("query", s.lq), ("key", s.lk), ("value", s.lk))),
        array(s.lq, s.value_width),
        weights=ll.AttentionWeights(*(array(widths[n], out[n]) for n in problems.FULL)),
        adapters={n: ll.Adapter(array(s.rank, out[n]), array(widths[n], s.rank)) for n in adapt},
        scale=1.0,
        beta=1.0 / s.width,
    )


def specification_of_worker(adapt):
    return specification(None, tuple(adapt), problems.Shape(48, 336, (3, 5, 4), 3, 2, 2))


def _words(jaxpr, inside=False):
    """(reduction, numbers) of every reduction over the mesh."""
    for eqn in jaxpr.eqns:
        name = next((w for w in WORDS if eqn.primitive.name.startswith(w)), None)
        if name:
            assert not inside, "a reduction for every block of tokens"
            yield name, sum(int(np.prod(v.aval.shape)) for v in eqn.invars)
            continue
        assert not any(
            w in eqn.primitive.name for w in ("all_gather", "all_to_all", "ppermute", "scatter_sum")
        )
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from _words(sub, inside or eqn.primitive.name in ("scan", "while"))


def traffic(problem, method, mesh):
    """[(reduction, numbers)] that every device says in one gradient."""
    return list(
        _words(jax.make_jaxpr(lambda p: ll.sharded_gradient(p, method, mesh))(problem).jaxpr)
    )


def tokens(n):
    return AbstractMesh((n,), ("tokens",))


@pytest.mark.parametrize(
    ("adapt", "degree"), [(problems.PARTIAL, 2), (problems.PARTIAL, 5), (problems.FULL, 3)]
)
def test_bytes_are_of_order_k_d(adapt, degree):
    said = traffic(specification(2**14, adapt), ll.Polynomial(degree), tokens(8))
    # M and T of 1 + d_value + r columns each, twice for the gradient in double precision beside it,
    # and the certificate's
    assert sum(n for _, n in said) <= 9 * monomials.count(WIDTH, degree) * WIDTH


def test_bytes_depend_neither_on_the_length_nor_on_the_devices():
    method = ll.Polynomial(2, "fitted")
    assert traffic(specification(2**12), method, tokens(8)) == traffic(
        specification(2**16), method, tokens(512)
    )


# ------------------------------------------------------------------------------------------------
# what is left to do


@functools.cache
def operations(length, devices):
    """Operations of one device."""
    method = ll.Polynomial(3)
    return count_operations(
        lambda p: ll.sharded_gradient(p, method, tokens(devices)), specification(length)
    )["flops"]


def test_one_device_does_what_the_plain_gradient_does():
    plain = count_operations(lambda p: ll.gradient(p, ll.Polynomial(3)), specification(2**16))
    assert operations(2**16, 1) == plain["flops"]


def test_strong_scaling_a_device_of_n_does_one_nth():
    # what is left are the frame's sample and the moments' tables, which every device makes
    assert operations(2**16, 64) <= 1.03 * operations(2**16, 1) / 64


def test_weak_scaling_a_device_does_the_same_however_many_there_are():
    assert operations(2**10, 1) == operations(2**16, 64)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("length", "method", "message"),
    [
        (
            20,
            ll.Polynomial(2),
            r"x_query: got 20 tokens, expected a multiple of 8, the devices of the mesh",
        ),
        (16, ll.Exact(), r"method: got Exact\(block_size=None\), expected a Polynomial"),
    ],
)
def test_refuses_what_it_cannot_split(length, method, message):
    with pytest.raises(ValueError, match=message):
        ll.sharded_gradient(specification(length), method, tokens(8))


def test_refuses_keys_that_the_mesh_does_not_divide():
    p = specification(None, problems.PARTIAL, problems.Shape(16, 12, (3, 5, 4), 3, 2, 2))
    with pytest.raises(ValueError, match=r"x_key: got 12 tokens, expected a multiple of 8"):
        ll.sharded_gradient(p, ll.Polynomial(2), tokens(8))


# -------------------------------------------------------------------------------------------------------- many machines


def test_the_slurm_script_runs_its_part_of_the_array():
    script = str(ROOT / "experiments" / "slurm_array.sh")
    env = {"PATH": os.environ["PATH"], "PYTHON": "echo", "SLURM_ARRAY_TASK_ID": "3"}
    command = ["bash", script, "configs/rates.toml", "16", "--size", "full"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "-m experiments configs/rates.toml --shard 3/16 --size full\n"
    done = subprocess.run(
        command[:3], env=env, capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: sbatch --array=1-N" in done.stderr
