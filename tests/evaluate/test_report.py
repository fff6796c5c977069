"""`python -m evaluate.report`: one setting varies at a time, and the page holds what came of it."""

import json
import re
import sys

import numpy as np
import pytest

from evaluate import composition, report, score
from tests.sample.conftest import cascade, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("reported") / "tiny", cascade())


@pytest.fixture
def command(monkeypatch, run):
    def start(*arguments):
        words = ["", "--checkpoint", run, "--num-images", 4, "--steps", 2, 1, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        report.main()
        folder = run / "evaluation"
        return json.loads((folder / "report.json").read_text()), (
            folder / "report.html"
        ).read_text()

    return start


VARIED = (
    *("--weights-of-guidance", 1, 3, "--numbers-of-steps", 1, 2, "--samplers", "ddim"),
    *("--levels", "pairs", "counts"),
)


def test_one_setting_varies_at_a_time(command, monkeypatch, capsys):
    """Drawn right by guidance 3 alone: the table and the page say so."""
    asked = []

    def draw(pipeline, chosen, given, options, level):
        asked.append((options["cond_scale"], options["timesteps"], options["sampler"]))
        right = tuple(np.ravel(options["cond_scale"]))[0] == 3
        return np.stack([scene.draw(32) for scene in chosen]) / 255 * right

    monkeypatch.setattr(composition, "draw", draw)
    found, page = command("--cond-scale", 2, 1, *VARIED)
    assert [tuple(np.ravel(scale)) for scale, *_ in asked[::2]] == [(1, 1), (3, 1)] + 3 * [(2, 1)]
    assert [tuple(np.ravel(steps)) for _, steps, _ in asked[4:8:2]] == [(1, 1), (2, 1)]
    assert asked[-1][2] == "ddim" and asked[0][2] != "ddim"
    shares = {(one["varied"], one["value"]): one["right"]["pairs"][0] for one in found}
    assert shares.pop(("guidance", "3")) == 1 and not any(shares.values())
    assert "| guidance 3 | 100 %" in capsys.readouterr().out
    assert page.count("<h2>") == 3 and page.count("data:image/png;base64,") == 3
    assert "<td>guidance 3</td><td>100 % (51-100)</td>" in page
    assert len(re.findall("<circle", page)) == 2 * 5


def test_fid_is_that_of_true_scenes(command, monkeypatch):
    """With the means of the colours in place of the network's features."""

    def network(images):
        return np.asarray(images).mean((1, 2))

    monkeypatch.setattr(score, "compiled", lambda path: network)
    found, page = command("--inception", "weights.pt", *VARIED)
    assert all(np.isfinite(one["fid"]) and one["fid"] > 0 for one in found)
    assert "FID against composition" in page


def test_mistakes(command, run, capsys):
    """Said before anything is drawn."""
    for flags in (("--samplers", "dim"), ("--out", "x")):
        with pytest.raises(SystemExit):
            command(*flags, *VARIED[:6])
        said = capsys.readouterr().err
        assert re.search("invalid choice 'dim'|Unrecognized options: --out", said), said
