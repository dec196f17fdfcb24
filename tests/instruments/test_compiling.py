"""Quick compilation is for what is soon done: large models and long texts are compiled well."""

import jax.numpy as jnp
import pytest

from lora_limits.instruments import compiling


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
