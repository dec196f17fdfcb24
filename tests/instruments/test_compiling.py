"""Quick compilation is for what is soon done: large models and long texts are compiled well."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from lora_limits.instruments import compiling
from tests.support import ROOT


@pytest.mark.parametrize(
    ("length", "numbers", "quick"),
    [(64, 1000, True), (1024, 900_000, True), (2048, 1000, False), (512, 2_000_000, False)],
)
def test_what_does_much_is_compiled_well(monkeypatch, length, numbers, quick):
    asked = []

    def record(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(compiling, "quick_jit", record)

    def function(graphdef, x):
        return x

    params = {"a": jnp.zeros(numbers - 1), "b": jnp.zeros(())}
    compiling.jit_for(function, length, params)
    assert bool(asked) == quick
    # Once in a process: the second time nothing is compiled again.
    assert compiling.jit_for(function, length, params) is compiling.jit_for(
        function, length, params
    )
    assert len(asked) == quick


@pytest.mark.parametrize(("taken", "forgotten"), [(50, False), (51, True)])
def test_programs_are_forgotten_once_half_of_the_maps_are_taken(
    monkeypatch, tmp_path, taken, forgotten
):
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "max_map_count").write_text("100\n")
    (tmp_path / "maps").write_text("a map\n" * taken)
    called = []
    monkeypatch.setattr(compiling.jax, "clear_caches", lambda: called.append(1))
    assert compiling.make_room(tmp_path, tmp_path) == forgotten == bool(called)


def test_where_no_maps_are_told_nothing_is_forgotten(tmp_path):
    assert not compiling.make_room(tmp_path / "none", tmp_path)


def test_a_forgotten_program_gives_its_maps_back():
    """Else forgetting would be of no use. In a process of its own, whose programs nobody misses."""
    if not Path("/proc/self/maps").is_file():
        pytest.skip("no /proc/self/maps on this system")
    code = (
        "import jax, jax.numpy as jnp\n"
        "from lora_limits.instruments.compiling import quick_jit\n"
        "taken = lambda: sum(1 for _ in open('/proc/self/maps'))\n"
        "functions = [quick_jit(lambda x, n=n: x * n + n) for n in range(40)]\n"
        "x, before = jnp.ones(3), taken()\n"
        "for function in functions: function(x)\n"
        "held = taken() - before\n"
        "jax.clear_caches()\n"
        "print(held, taken() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    held, left = map(int, done.stdout.split())
    assert held >= 40
    assert left < held / 2
