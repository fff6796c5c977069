"""One environment for every test and every command that a test starts: eight emulated devices on
the CPU, float32 products in full precision, no network. Set before anything imports JAX."""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"
FLAGS = "--xla_force_host_platform_device_count=8"
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Those of a file are dropped after it: a worker would keep all, 5 GB in the end."""
    yield
    import jax

    jax.clear_caches()
