"""The README's loop runs as it stands there."""

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parents[1] / "README.md"


def test_the_loop_of_the_readme():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert np.isfinite(names["value"]) and names["value"] > 0
    assert names["picture"].shape == (1, 16, 16, 3)
    assert 0 <= names["picture"].min() and names["picture"].max() <= 1
