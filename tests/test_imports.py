"""The import graph points one way: a room imports only what it stands on."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"types", "fields", "unet_config", "if_config", "resize", "pixels", "sharding"}
LEAVES |= {"streams", "tiling", "memory"}
# What a cascade is, as data.
MODEL = LEAVES | {"diffusion", "diffusion_config", "stage", "config", "presets"}
THEORY = MODEL | {
    "nn",
    "text",
    "conditioning",
    "training",
    "sampling",
    "tiled",
    "cascade",
    "imagen",
}
ALL = THEORY | {
    *(
        "run_config",
        "checkpoint",
        "call_arguments",
        "pipeline",
        "interop",
        "data",
        "distributed",
        "flops",
        "metrics",
        "storage",
        "compiling",
        "evaluation",
    ),
    "imagen_jax",
}
MAY_IMPORT = {
    "types": set(),
    "fields": set(),
    "unet_config": {"fields"},
    "if_config": {"fields", "unet_config"},
    "resize": {"types"},
    "pixels": set(),
    "sharding": {"types"},
    "streams": {"types"},
    "tiling": {"types"},
    "memory": {"sharding"},
    "diffusion": {"types"},
    "stage": LEAVES | {"diffusion"},
    "diffusion_config": {"diffusion", "fields"},
    "config": LEAVES | {"diffusion", "diffusion_config", "stage"},
    "presets": {"config", "diffusion_config", "if_config"},
    "nn": LEAVES,
    "text": LEAVES | {"nn", "config", "storage", "interop.torch_file"},
    "conditioning": LEAVES | {"diffusion", "nn"},
    "training": LEAVES | {"diffusion", "nn", "stage", "conditioning"},
    "tiled": LEAVES | {"nn"},
    "sampling": LEAVES | {"compiling", "diffusion", "nn", "stage", "conditioning", "tiled"},
    "cascade": MODEL | {"nn", "training", "sampling"},
    "imagen": MODEL | {"nn", "text", "training", "sampling", "cascade"},
    "storage": set(),
    "run_config": MODEL | {"storage", "text"},
    "checkpoint": THEORY | {"run_config", "storage"},
    "call_arguments": {"types", "streams"},
    "pipeline": THEORY | {"call_arguments", "run_config", "checkpoint", "storage"},
    "interop": THEORY | {"run_config", "checkpoint", "storage", "interop.torch_file"},
    "interop.torch_file": set(),
    "data": LEAVES | {"text", "storage"},
    "data.embed": MODEL | {"text", "storage", "nn", "distributed", "data"},
    "data.inspect": LEAVES | {"data", "text"},
    "metrics": LEAVES | {"data", "text", "interop.torch_file"},
    "errors": set(),
    "compiling": set(),
    "evaluation": LEAVES | {"compiling", "diffusion", "nn", "stage", "training"},
    "distributed": set(),
    "flops": set(),
    "imagen_jax": ALL,
    "train": ALL,
    "sample": ALL,
    "evaluate": ALL,
    "tools": ALL | {"train"},
}
TOPS = ("imagen_jax", "train", "sample", "evaluate", "tools")
FOREIGN = {"torch", "torchvision", "imagen_pytorch", "tensorflow"}


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything that the rules speak of."""
    files = [p for top in TOPS for p in (ROOT / top).rglob("*.py")]
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def room(module: str) -> str:
    """`imagen_jax.nn.unet` -> `nn`; `train.step` -> `train`; the package itself -> `imagen_jax`."""
    top, _, rest = module.partition(".")
    if top != "imagen_jax":
        return top
    return rest if rest in MAY_IMPORT else rest.partition(".")[0] or top


def imported(module: str, path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, those of other projects included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = (
                    module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                )
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules() else base


@pytest.mark.parametrize("module", modules())
def test_a_room_imports_only_what_it_stands_on(module):
    here = room(module)
    assert here in MAY_IMPORT, f"a new room: say in MAY_IMPORT what {module} may import"
    allowed = MAY_IMPORT[here] | {here, "errors"}
    for name in imported(module, modules()[module]):
        if name.split(".")[0] in (*TOPS, "tests", "benchmarks"):
            assert room(name) in allowed, f"{module} imports {name}"


LONGEST = 60  # lines of a function


def test_functions_of_the_library_are_short():
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and module.startswith("imagen_jax"):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST, f"{module}.{node.name} has {lines} lines"


def walk(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if into_functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from walk(child, into_functions=into_functions)


def foreign(path: Path, *, into_functions: bool) -> set[str]:
    names = set()
    for node in walk(ast.parse(path.read_text()), into_functions=into_functions):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name.split(".")[0] for alias in aliases}
            case ast.ImportFrom(module=str(module), level=0):
                names.add(module.split(".")[0])
    return names & FOREIGN


def test_torch_and_tensorflow_stay_in_functions_of_the_few_that_need_them():
    own = {*modules().values(), *ROOT.glob("*.py")}
    allowed = {
        *(ROOT / "imagen_jax" / "interop").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    }
    for path in own | allowed:
        found = foreign(path, into_functions=path not in allowed)
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_importing_the_package_is_light():
    """No torch, no TensorFlow, and no more than ten seconds of processor time."""
    program = (
        "import sys, time, imagen_jax\n"
        f"loaded = {FOREIGN!r} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else time.process_time() > 10)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
