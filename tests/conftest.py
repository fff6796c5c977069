"""One environment for every test and every command that a test starts: eight emulated devices on
the CPU, programs compiled quickly, float32 products in full precision, no network. Set before
anything imports JAX.

Tests of files that import torch, themselves or through `tests.parity` and similar ones, are marked
`torch`; with `-m "not torch"` these files are not read, so torch need not be installed.
Tests marked `page` are deselected where gradio, playwright or a browser is missing.
"""

import ast
import functools
import gc
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import XLA_FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"
FLAGS = ["--xla_force_host_platform_device_count=8", *XLA_FLAGS]
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*given, *(flag for flag in FLAGS if flag not in given)])

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TORCH = ("torch", "safetensors.torch", "imagen_jax.interop.reference")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    without = "not torch" in (config.getoption("markexpr") or "")
    python = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if without and python and needs_torch(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if needs_torch(item.path):
            item.add_marker("torch")
    of_page = [item for item in items if item.get_closest_marker("page")]
    if of_page and not can_show_pages():
        config.hook.pytest_deselected(items=of_page)
        items[:] = [item for item in items if item not in of_page]


def browser() -> str | None:
    """Where a Chromium is."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def can_show_pages() -> bool:
    installed = all(importlib.util.find_spec(name) for name in ("gradio", "playwright"))
    return installed and browser() is not None


@functools.cache
def needs_torch(path: Path) -> bool:
    """Whether importing a file of tests imports torch."""
    names = set(imported(path))
    own = {ROOT / (name.replace(".", "/") + ".py") for name in names if name.startswith("tests.")}
    return not names.isdisjoint(TORCH) or any(map(needs_torch, filter(Path.exists, own)))


def imported(path: Path) -> Iterator[str]:
    """Modules, and names in them, that a file imports at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            yield from [module] * bool(module)
            yield from (f"{module}.{a.name}" if module else a.name for a in node.names)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Those of a file are dropped after it: a worker would keep all, 5 GB in the end. What is there
    before it, torch and JAX above all, is not looked through by every collection."""
    gc.freeze()
    yield
    import jax

    jax.clear_caches()
    gc.collect()
