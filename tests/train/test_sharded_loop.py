"""A whole run on a mesh: nothing is whole on a device, and it moves to other meshes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import imagen_jax
from imagen_jax import checkpoint
from imagen_jax.sharding import make_layout
from tests.train import support
from train import loop
from train.run import RunDir


def run(settings, **changes):
    """`settings` with changes, on their mesh; every array is split, however small."""
    settings = dataclasses.replace(settings, **changes)
    assert loop.run(settings, 1, make_layout(settings.mesh, rows=settings.rows, min_size=0))
    return settings


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    settings = support.settings(tmp_path_factory.mktemp("straight"), eps=1e-3, mesh="1x1")
    return run(settings)


@pytest.mark.slow
def test_a_run_moves_between_meshes(straight, tmp_path):
    settings = support.settings(tmp_path, eps=1e-3, mesh="4x2", steps=2)
    run(settings, sample_every=2, sample_steps=2)
    assert (settings.run / "samples" / "unet1-0000002.png").exists()
    run(settings, mesh="2x4", steps=4, resume=True)
    for item in ("params", "ema"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            support.saved(settings.run, 4, item),
            support.saved(straight.run, 4, item),
        )
    for kind in ("train", "eval/train", "eval/heldout"):
        losses = {}
        for name in (settings, straight):
            for line in support.metrics(name.run, kind):
                losses.setdefault(line["step"], []).append(line["loss"])
        assert len(losses[4]) == 2
        for step, (moved, *same) in losses.items():
            np.testing.assert_allclose(same, moved, rtol=1e-5, err_msg=f"{kind} {step}")
    unet = imagen_jax.load(settings.run).unets[0]
    assert unet.init_conv.kernel[...].devices() == {jax.devices()[0]}


def test_no_device_is_given_a_whole_state(straight):
    layout = make_layout("4x2", rows=4, min_size=0)
    run_dir = RunDir.open(straight.run, support.CASCADE, support.CASCADE.stage(1), resume=True)
    begin = functools.partial(run_dir.begin, straight, seed=straight.seed, init_from=None)
    fresh = begin(layout)
    record = checkpoint.read_meta(straight.run, 1, 4)["settings"]
    resumed = run_dir.resume(straight, layout, record)
    for start in (fresh, resumed):
        arrays = [x for x in jax.tree.leaves(start.state) if x.ndim > 1]
        held = sum(x.addressable_shards[0].data.size for x in arrays)
        assert held < sum(x.size for x in arrays) / 6
    alone = begin(make_layout("1x1", rows=4))
    np.testing.assert_array_equal(
        fresh.state.params["init_conv"]["kernel"],
        alone.state.params["init_conv"]["kernel"],
    )
