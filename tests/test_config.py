"""Configurations survive JSON, and every mistake is named at construction."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from imagen_jax import config as config_module
from imagen_jax import presets
from imagen_jax.config import ImagenConfig, UnetConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_json_round_trip(name):
    config = presets.PRESETS[name]()
    assert ImagenConfig.from_dict(config.to_dict()) == config


def test_unets_are_adapted_to_the_cascade():
    config = presets.tiny()
    assert [unet.lowres_cond for unet in config.unets] == [False, True]
    assert {unet.text_embed_dim for unet in config.unets} == {128}
    assert config.stage(2).previous_image_size == 8


def test_schedules_are_padded_as_in_the_reference():
    unet = UnetConfig(dim=8)
    config = ImagenConfig(unets=(unet,) * 3, image_sizes=(8, 16, 32), noise_schedules="linear")
    schedules = [config.stage(number).noise_schedule for number in (1, 2, 3)]
    assert schedules == ["linear", "cosine", "linear"]


def cascade(**changes):
    return lambda: ImagenConfig.from_dict(presets.tiny().to_dict() | changes)


def unet(**changes):
    return lambda: UnetConfig.from_dict(dict(dim=8) | changes)


MISTAKES = {
    "no field 'image_size'; did you mean 'image_sizes'": cascade(image_size=8),
    "2 unets and image_sizes = .8,.": cascade(image_sizes=[8]),
    "timesteps = .1, 2, 3. has 3 entries for 2 unets": cascade(timesteps=[1, 2, 3]),
    "the base is never cropped": cascade(random_crop_sizes=[4, 8]),
    "a crop of 32 pixels does not fit a picture of 16": cascade(random_crop_sizes=[None, 32]),
    "its size 9 is no multiple": cascade(image_sizes=[9, 16]),
    "cond_drop_prob = 2.0 must lie in": cascade(cond_drop_prob=2.0),
    "text_embed_dim must be given": cascade(text_encoder_name="unknown", text_embed_dim=None),
    "only_train_unet_number = 3": cascade(only_train_unet_number=3),
    "layer_attns = .True,. has 1 entries": unet(layer_attns=[True]),
    "attn_heads = 1; attention needs at least 2": unet(attn_heads=1),
    "max_text_len = 600 must lie in": unet(max_text_len=600),
    "must begin with 1 unless memory_efficient": unet(dim_mults=[2, 4]),
    "memory_efficient needs init_dim": unet(memory_efficient=True, init_dim=16),
    "every size must be odd": unet(init_cross_embed_kernel_sizes=[3, 4]),
    "init_conv_kernel_size = 4 must be odd": unet(init_conv_kernel_size=4),
    "norm='group' has 8 groups": unet(dim=12, norm="group"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()


def test_a_misspelt_schedule_is_one_line(tmp_path):
    """In a process of its own: here the annotations are checked before our own message comes."""
    file = tmp_path / "cascade.json"
    file.write_text(json.dumps(presets.tiny().to_dict() | dict(noise_schedules="cosin")))
    command = [sys.executable, "-m", "train.base", "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: ImagenConfig.noise_schedules = 'cosin' is not one of 'cosine', 'linear'"
    )
    assert len(done.stderr.splitlines()) == 1


def test_ignored_arguments_warn_once(monkeypatch):
    monkeypatch.setattr(config_module, "_warned", set())
    with pytest.warns(UserWarning, match="dropout = 0.1 has no effect"):
        UnetConfig(dim=8, dropout=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UnetConfig(dim=8, dropout=0.1)
