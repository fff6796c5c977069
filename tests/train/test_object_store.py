"""A run whose directory is gs://: saved, interrupted, resumed, sampled from."""

import dataclasses
import sys
from pathlib import Path

import pytest

from imagen_jax import checkpoint, storage
from imagen_jax.errors import UserError
from sample import text_to_image
from tests import object_store
from tests.train import support
from train import loop


@pytest.mark.slow
def test_a_run_on_an_object_store_is_one_on_a_disk(tmp_path, monkeypatch, capsys):
    (tmp_path / "disk").mkdir()
    options = dict(save_every=1, sample_every=4, sample_steps=2, keep=2)
    disk = support.settings(tmp_path / "disk", **options)
    assert loop.run(disk, 1)
    with object_store.serve() as bucket:
        run = storage.folder(f"{bucket}/runs/a")
        settings = support.settings(tmp_path, **options, steps=2)
        settings = dataclasses.replace(settings, workdir=Path(run), resume=True)
        assert settings.run == run and str(settings.run) == "gs://bucket/runs/a"
        assert loop.run(settings, 1)
        # As a process leaves a step that is killed before it is complete.
        (run / "unet1" / "2" / checkpoint.MARKER).unlink()
        assert checkpoint.latest_step(run, 1) == 1
        assert loop.run(dataclasses.replace(settings, steps=4), 1)
        out = capsys.readouterr().out
        assert "step 2 of gs://bucket/runs/a/unet1 is not complete" in out
        assert "Resuming from step 1." in out
        assert checkpoint.steps(run, 1) == [4, 3] and not checkpoint.incomplete(run, 1)
        for item in ("params", "ema", "opt_state"):
            support.assert_equal(support.saved(run, 4, item), support.saved(disk.run, 4, item))
        losses = [[line["loss"] for line in support.metrics(r)] for r in (run, disk.run)]
        assert sorted(set(losses[0])) == sorted(losses[1])
        picture = run / "samples" / "unet1-0000004.png"
        assert picture.read_bytes() == (disk.run / "samples" / picture.name).read_bytes()
        words = ["--checkpoint", str(run), "--prompt", "pear", "--steps", "2"]
        words += ["--stop-at-unet-number", "base"]
        monkeypatch.setattr(sys, "argv", ["", *words])
        text_to_image.main()
        assert (run / "samples" / "text_to_image" / "pear-0.png").exists()


def test_what_a_store_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(UserError, match=r"gs://bucket/run/unet1: .*pip install -e '.\[gcs\]'"):
        checkpoint.Writer("gs://bucket/run", 1)
