"""Settings for every test: eight simulated devices and a compilation cache that survives runs."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs of tests run for a moment and take seconds to compile: a fifth to two fifths less so.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Inherited by the processes that tests start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import pytest  # noqa: E402  (after the environment that JAX reads)

# A process may have 65,530 memory mappings (Linux), and every compiled program takes several.
_MANY_MAPPINGS = 15_000


@pytest.fixture(autouse=True, scope="module")
def _few_mappings():
    """Drops compiled programs between modules before the process runs out of mappings."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        import jax

        jax.clear_caches()
