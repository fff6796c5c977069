"""Every command's `--help` says how the command is started."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("train", "sample", "evaluate", "tools", "imagen_jax/data")
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"^def main\(\)", path.read_text(), re.M)
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_how_the_command_is_started(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{name.replace('.', '/')}.py"), "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(name).main()
    assert f"usage: python -m {name} " in capsys.readouterr().out


def test_commands_are_found():
    found = {"train.super_res", "sample.serve", "evaluate.report", "tools.plan"}
    assert found | {"imagen_jax.data.embed", "imagen_jax.data.inspect"} <= set(COMMANDS)
