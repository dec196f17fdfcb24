"""One strict session: 64 bits, no silent promotion of dtypes or ranks; warnings are errors
(pyproject.toml).
"""

import os
import signal
from pathlib import Path

from tests.support import ROOT

# What one worker or child has compiled the others read, this time and the next. JAX reads JAX_*
# when it is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from tests.support import shapes

shapes.install()  # before any module of the library is imported

from lora_limits.instruments.compiling import QUICK

# Compiling is most of what the tests do: compile fast rather than well, and each program in one
# piece, for every core has a test of its own. XLA reads its flags at its first computation, and
# children inherit them.
FLAGS = QUICK | {"xla_cpu_parallel_codegen_split_count": 1}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{k}={str(v).lower()}" for k, v in FLAGS.items()))

import jax
import pytest
from hypothesis import HealthCheck, settings

from tests.support.toy_experiment import NOTE

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run; tests marked slow draw fresh ones.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Skips tests marked gpu where JAX sees no accelerator; the experiments first, so that one
    worker has them all.
    """
    items.sort(key=lambda item: item.path.name != "test_experiments.py")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() == "cpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="JAX sees no accelerator"))


@pytest.fixture(autouse=True)
def precision():
    """64 bits after every test: a sweep that is run in it sets the precision of its experiment."""
    yield
    if not jax.config.jax_enable_x64:
        jax.config.update("jax_enable_x64", True)


@pytest.fixture
def heeding_interrupts():
    """A shell's background jobs ignore SIGINT, and so would the programs that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Write toy.toml, whole or changed, into an empty folder that becomes the current one."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)

    def write(old="", new=""):
        assert old in NOTE
        Path("toy.toml").write_text(NOTE.replace(old, new, 1) if old else NOTE + new)
        return "toy.toml"

    write()
    return write
