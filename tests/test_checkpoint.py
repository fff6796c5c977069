"""Run directories: what is saved comes back, and what is damaged or unfit is one line."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import imagen_jax
from imagen_jax import checkpoint, nn, run_config
from imagen_jax.config import ImagenConfig, NullUnetConfig, UnetConfig
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Pipeline
from tests import SMALLEST_UNET

ROOT = Path(__file__).parents[1]
UNET = UnetConfig(**SMALLEST_UNET, cond_dim=8, max_text_len=16)
CASCADE = ImagenConfig(unets=(UNET, UNET), image_sizes=(8, 12), text_encoder_name="demo")


def params_of(seed: int, number: int = 1):
    rng, shapes = np.random.default_rng(seed), nn.abstract(CASCADE.unets[number - 1])[1]
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


def loaded(run, number: int = 1, **options):
    unet = imagen_jax.load(run, **options).unets[number - 1]
    return nnx.to_pure_dict(nnx.split(unet)[1])


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """As training leaves it: online weights and their average of U-Net 1, two steps."""
    folder = tmp_path_factory.mktemp("run")
    run_config.write(folder, CASCADE, {"unet1": {"steps": 2}})
    with checkpoint.Writer(folder, 1) as writer:
        for step in (1, 2):
            writer.save(step, {"params": params_of(step), "ema": params_of(10 + step)}, {})
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_what_is_saved_comes_back(tmp_path):
    params = params_of(0), params_of(1, 2)
    unets = [nn.bind(CASCADE.unets[i], tree) for i, tree in enumerate(params)]
    imagen_jax.save(tmp_path, imagen_jax.Imagen(CASCADE, unets=unets), step=5)
    assert run_config.read(tmp_path) == CASCADE
    for number in (1, 2):
        assert checkpoint.latest_step(tmp_path, number) == 5
        for weights in ("ema", "online"):  # no average was kept
            assert_equal(loaded(tmp_path, number, weights=weights), params[number - 1])


def test_the_average_or_the_online_weights(run):
    assert_equal(loaded(run), params_of(12))
    assert_equal(loaded(run, weights="online"), params_of(2))
    assert_equal(checkpoint.load_params(run, 1, checkpoint.Choice(1, "ema")), params_of(11))


def test_a_stage_without_weights_cannot_be_sampled(run):
    imagen = imagen_jax.load(run)
    assert isinstance(imagen.unets[1], nn.NullUnet)
    told = dict(text_embeds=np.ones((1, 3, 128), np.float32), timesteps=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="U-Net 2 has no weights"):
        imagen.sample(**told, start_at_unet_number=2, start_image_or_video=np.ones((1, 8, 8, 3)))
    nothing = imagen_jax.load(run, unet_numbers=[])
    with pytest.raises(ValueError, match="U-Net 1 has no weights"):
        nothing.sample(**told)


def test_a_null_unet_stays_one(tmp_path):
    config = ImagenConfig(
        unets=(NullUnetConfig(), UNET), image_sizes=(8, 12), text_encoder_name="demo"
    )
    unets = [nn.NullUnet(), nn.bind(config.unets[1], params_of(0, 2))]
    imagen_jax.save(tmp_path, imagen_jax.Imagen(config, unets=unets))
    assert isinstance(imagen_jax.load(tmp_path).unets[0], nn.NullUnet)
    assert_equal(loaded(tmp_path, 2), params_of(0, 2))


def test_nothing_is_saved_silently_at_an_earlier_step(copy):
    """Orbax would leave it out without a word."""
    unets = [nn.bind(CASCADE.unets[0], params_of(0)), nn.NullUnet()]
    imagen = imagen_jax.Imagen(CASCADE, unets=unets)
    for step in (0, 2):
        with pytest.raises(ValueError, match=f"is at step 2: step {step} cannot be added"):
            imagen_jax.save(copy, imagen, step=step)
    assert_equal(loaded(copy), params_of(12))
    imagen_jax.save(copy, imagen, step=3)
    assert_equal(loaded(copy), params_of(0))


def test_another_cascade_is_refused(copy):
    before = (copy / "config.json").read_text()
    data = CASCADE.to_dict()
    data["unets"][1]["dim"] = 16
    with pytest.raises(ValueError, match="another cascade: unets.1.dim is 8 there, 16 here"):
        run_config.write(copy, ImagenConfig.from_dict(data))
    assert (copy / "config.json").read_text() == before
    run_config.write(copy, CASCADE, {"unet2": {"steps": 9}})
    training = json.loads((copy / "config.json").read_text())["training"]
    assert training == {"unet1": {"steps": 2}, "unet2": {"steps": 9}}


def test_stages_trained_side_by_side_write_one_configuration(copy):
    def write(name):
        for steps in range(100):
            run_config.write(copy, CASCADE, {name: {"steps": steps}})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("unet1", "unet2")))
    training = json.loads((copy / "config.json").read_text())["training"]
    assert training == {"unet1": {"steps": 99}, "unet2": {"steps": 99}}


def unmarked(step: Path) -> None:
    (step / checkpoint.MARKER).unlink()


def torn_by_a_power_cut(step: Path) -> None:
    (step / "ema" / "_METADATA").write_text("")


@pytest.mark.parametrize(
    ("damage", "why"),
    [(unmarked, "it has no commit marker"), (torn_by_a_power_cut, "ema/_METADATA is empty")],
)
def test_an_incomplete_step_is_passed_over_and_said(copy, damage, why):
    damage(copy / "unet1" / "2")
    note = f"{copy}/unet1: step 2 is not complete ({why}); step 1 is used."
    assert checkpoint.steps(copy, 1) == [2, 1] and checkpoint.latest_step(copy, 1) == 1
    assert checkpoint.choose(copy, 1) == checkpoint.Choice(1, "ema", (note,))
    with pytest.warns(checkpoint.PassedOver, match=re.escape(note)):
        assert_equal(loaded(copy), params_of(11))
    assert Pipeline.load(copy).choices[1].notes == (note,)


def test_files_that_are_empty_on_purpose_are_in_the_marker(tmp_path):
    with checkpoint.Writer(tmp_path, 1) as writer:
        writer.save(1, {"params": params_of(1)}, {})
        writer.manager.wait_until_finished()
        (tmp_path / "unet1" / "1" / "params" / "new_kind_of_file").write_text("")
    assert not checkpoint.incomplete(tmp_path, 1)
    (tmp_path / "unet1" / "1" / "params" / "another").write_text("")
    assert checkpoint.incomplete(tmp_path, 1) == {1: "params/another is empty"}


def test_steps_of_earlier_versions_have_no_marker(copy):
    for step in (1, 2):
        unmarked(copy / "unet1" / str(step))
    (note,) = checkpoint.choose(copy, 1).notes
    assert "step 2 was written by an earlier version, without a commit marker" in note
    with checkpoint.Writer(copy, 1) as writer:
        writer.save(3, {"params": params_of(3)}, {})
    assert checkpoint.choose(copy, 1) == checkpoint.Choice(3, "online")
    assert not checkpoint.incomplete(copy, 1)


def test_weights_that_are_not_finite_are_named(tmp_path):
    params = params_of(0)
    params["final_conv"]["bias"][1] = np.inf
    imagen = imagen_jax.Imagen(CASCADE, unets=[nn.bind(CASCADE.unets[0], params), nn.NullUnet()])
    imagen_jax.save(tmp_path, imagen, step=4)
    message = (
        r"unet1, step 4, online weights: final_conv.bias holds NaN or infinity \(1 of 3 values\)"
    )
    for load in (imagen_jax.load, lambda run: Pipeline.load(run).imagen):
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_without_locks_there_is_none(tmp_path):
    """As on Windows, which has no fcntl."""
    program = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import imagen_jax; from imagen_jax import presets, run_config\n"
        f"run_config.write({str(tmp_path)!r}, presets.tiny())"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_half_a_step_is_none(copy):
    """What a crash leaves under Orbax's temporary name is neither found nor in the way."""
    shutil.copytree(copy / "unet1" / "2", copy / "unet1" / "3.orbax-checkpoint-tmp")
    assert checkpoint.latest_step(copy, 1) == 2
    assert_equal(loaded(copy), params_of(12))
    with checkpoint.Writer(copy, 1) as writer:
        writer.save(3, {"params": params_of(3)}, {"step": 3})
    assert_equal(loaded(copy), params_of(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "config.json").unlink(),
            "is not a run directory: it has no config.json",
        ),
        (lambda run: (run / "config.json").write_text("{"), "is not JSON"),
        (
            lambda run: (run / "config.json").write_text("[]"),
            "must contain a JSON object, not list",
        ),
        (lambda run: shutil.rmtree(run / "unet1" / "2" / "params"), "has no params for step 2"),
        (
            lambda run: (run / "unet1" / "2" / "params" / "_METADATA").write_text('{"tree'),
            "is damaged, or has another architecture",
        ),
    ],
)
def test_damage_is_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message) as said:
        imagen_jax.load(copy, weights="online")
    assert "\n" not in str(said.value)


def test_damaged_meta_is_one_line(copy):
    (copy / "unet1" / "2" / "meta" / "metadata").write_text('{"step')
    with pytest.raises(ValueError, match="meta is damaged"):
        checkpoint.read_meta(copy, 1, 2)


def test_reading_that_is_given_up_is_silent():
    """As Orbax drops the arrays that it still reads when one has failed."""
    program = """
import commands

commands.keep_writers_logs()


async def read():
    try:
        await Endless()
    except BaseException as error:
        raise Exception("long details") from error


class Endless:
    def __await__(self):
        while True:
            yield


class Loud:
    def __del__(self):
        raise ValueError("heard")


reading = read()
reading.send(None)
del reading
Loud()
"""
    told = [sys.executable, "-c", program]
    done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "long details" not in done.stderr and "heard" in done.stderr


def truncate_arrays(run: Path) -> None:
    for file in (run / "unet1" / "2" / "ema").rglob("*"):
        if file.is_file() and "metadata" not in file.name.lower():
            file.write_bytes(file.read_bytes()[:10])


def widen_in_the_configuration(run: Path) -> None:
    data = json.loads((run / "config.json").read_text())
    data["imagen"]["unets"][0]["dim"] = 16
    (run / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize("damage", [truncate_arrays, widen_in_the_configuration])
def test_unfit_arrays_are_one_line(copy, damage):
    """In a process of its own: threads of Orbax that still read complain after the failure."""
    damage(copy)
    command = [sys.executable, "-m", "sample.text_to_image", "--prompt", "pear"]
    command += ["--checkpoint", str(copy), "--stop-at-unet-number", "base"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert "ema is damaged, or has another architecture" in done.stderr
