"""The README's Python runs as it is printed there."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from imagen_jax import presets
from tests.sample.conftest import cascade, save_run

README = Path(__file__).parents[1] / "README.md"
PIPELINE, LOOP = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def run(code: str) -> dict:
    names = {}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_the_pipeline_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = presets.scenes().image_sizes  # of the demo's stages
    small = cascade()
    unets = small.unets[:1] * len(sizes)
    config = dataclasses.replace(small, unets=unets, image_sizes=sizes, pred_objectives="v")
    save_run(Path("runs/demo"), config, numbers=(1, 2, 3))
    names = run(PIPELINE)
    assert names["result"].images[0].size == (32, 32) and names["result"].seeds == [7]
    assert Path("triangle.png").exists()


@pytest.mark.slow
def test_the_loop_of_the_readme():
    names = run(LOOP)
    assert np.isfinite(names["value"]) and names["value"] > 0
    assert names["picture"].shape == (1, 16, 16, 3)
    assert 0 <= names["picture"].min() and names["picture"].max() <= 1
