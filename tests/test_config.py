"""Configurations: JSON and back, what a cascade decides for its U-Nets, one line per mistake."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from imagen_jax import presets, unet_config
from imagen_jax.config import ImagenConfig, NullUnetConfig, UnetConfig
from imagen_jax.diffusion.schedules import log_snr
from imagen_jax.diffusion.vp import VP
from tests import cascades
from tests.cascades import cascade

ROOT = Path(__file__).parents[1]
NULL = NullUnetConfig()
SMALL = UnetConfig(dim=8, dim_mults=(1, 2))


@pytest.fixture(autouse=True)
def no_type_checks(monkeypatch):
    """As outside of tests, where the configurations find every mistake themselves."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_json_round_trip_of_presets(name):
    config = presets.PRESETS[name]()
    text = json.dumps(config.to_dict())
    assert ImagenConfig.from_dict(json.loads(text)) == config
    for unet in config.unets:
        assert type(unet).from_dict(unet.to_dict()) == unet


def test_the_papers_own_cascade():
    """Betas of the last stage grow linearly; the noise on small images is the first's."""
    stages = [presets.paper().stage(number) for number in (1, 2, 3)]
    betas = [stage.process.betas for stage in stages]
    assert betas == ["squaredcos_cap_v2", "squaredcos_cap_v2", "linear"]
    assert stages[2].lowres.process.betas == "squaredcos_cap_v2"


def test_json_round_trip_of_everything():
    config = cascade(
        unets=(NULL, SMALL),
        image_sizes=[4, 8],
        timesteps=(3, 7),
        random_crop_sizes=[None, 4],
        noise_schedules=("linear", "cosine"),
        min_snr_gamma=[5, 2.5],
        dynamic_thresholding=(True, False),
    )
    again = ImagenConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    assert again.unets[0] == NULL and again.random_crop_sizes == (None, 4)


def test_unets_are_fitted_to_the_cascade():
    config = ImagenConfig(
        unets=(SMALL, SMALL, SMALL), image_sizes=(8, 16, 32), text_embed_dim=5, channels=1
    )
    assert [unet.lowres_cond for unet in config.unets] == [False, True, True]
    assert {(u.text_embed_dim, u.channels, u.channels_out) for u in config.unets} == {(5, 1, 1)}
    free = dataclasses.replace(config, condition_on_text=False)
    assert not any(unet.cond_on_text for unet in free.unets)


def test_one_unet_needs_no_tuple():
    config = ImagenConfig(unets=SMALL, image_sizes=8)
    assert config == ImagenConfig(unets=(SMALL,), image_sizes=(8,))
    data = config.to_dict()
    assert ImagenConfig.from_dict(dict(data, unets=data["unets"][0], image_sizes=8)) == config


def test_text_width_is_known_by_name():
    config = ImagenConfig(unets=SMALL, image_sizes=8, text_encoder_name="google/t5-v1_1-xxl")
    assert config.text_embed_dim == config.unets[0].text_embed_dim == 4096


@pytest.mark.parametrize(
    ("given", "count", "want"),
    [
        ("cosine", 1, ["cosine"]),
        ("linear", 2, ["linear", "cosine"]),
        ("cosine", 4, ["cosine", "cosine", "linear", "linear"]),
        (("linear", "linear"), 3, ["linear", "linear", "linear"]),
    ],
)
def test_schedules_are_filled_up_as_in_the_reference(given, count, want):
    sizes = tuple(8 * 2**i for i in range(count))
    unet = UnetConfig(**cascades.SMALLEST)
    config = ImagenConfig(
        unets=(unet,) * count, image_sizes=sizes, text_embed_dim=6, noise_schedules=given
    )
    assert [config.stage(i + 1).process.schedule for i in range(count)] == want
    for schedule, theirs in zip(want, cascades.theirs(config).noise_schedulers, strict=True):
        end = theirs.log_snr(torch.ones(1)).item()
        assert end == pytest.approx(log_snr(1.0, schedule), abs=0.1)


def test_stages_resolve_tuples():
    config = cascade(
        timesteps=(3, 7),
        pred_objectives=("noise", "v"),
        random_crop_sizes=(None, 4),
        min_snr_loss_weight=(False, True),
        min_snr_gamma=(5.0, 2.0),
        dynamic_thresholding=(True, False),
    )
    first, second = config.stage(1), config.stage(2)
    assert [config.sampling_defaults(number).num_steps for number in (1, 2)] == [3, 7]
    assert first.lowres is None and second.lowres.size == (5, 5) and second.size == (8, 8)
    assert (first.crop, second.crop) == (None, (4, 4))
    assert first.process == VP(objective="noise", min_snr_gamma=None)
    assert second.process == VP(objective="v", min_snr_gamma=2.0)
    assert config.stages == (first, second)
    assert (first.dynamic_thresholding, second.dynamic_thresholding) == (True, False)


def test_sizes_are_height_and_width():
    """One integer means a square; (h, w) for each U-Net, or alone for a single one."""
    config = cascade(image_sizes=((4, 6), [8, 12]), random_crop_sizes=(None, (4, 8)))
    assert config.image_sizes == ((4, 6), (8, 12))
    first, second = config.stages
    assert (first.size, second.size, second.crop) == ((4, 6), (8, 12), (4, 8))
    assert second.sample_shape == (8, 12, 3) and second.lowres.size == (4, 6)
    assert cascade(image_sizes=((5, 5), 8)).image_sizes == (5, 8)
    assert ImagenConfig(unets=SMALL, image_sizes=(4, 6)).image_sizes == ((4, 6),)
    assert ImagenConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(dim_mult=(1, 2)), "no field 'dim_mult'; did you mean 'dim_mults'?"),
        (dict(xyzzy=1), "no field 'xyzzy'."),
        (dict(dim="8"), "UnetConfig.dim must be an int, got '8' (str)"),
        (dict(dim=True), "UnetConfig.dim must be an int, got True (bool)"),
        (dict(resize_mode="nearst"), "resize_mode must be one of 'nearest', 'bilinear'"),
        (dict(layer_attns=(True,)), "layer_attns = (True,) has 1 entries"),
        (dict(num_resnet_blocks=(1, 2, 3)), "num_resnet_blocks = (1, 2, 3) has 3 entries"),
        (dict(attn_heads=1), "attn_heads = 1"),
        (dict(learned_sinu_pos_emb_dim=5), "learned_sinu_pos_emb_dim = 5 must be even"),
        (dict(max_text_len=0), "max_text_len = 0"),
        (dict(max_text_len=600), "max_text_len = 600 must lie in 1 .. 512"),
        (dict(text_embed_dim=None), "cond_on_text needs text_embed_dim"),
        (dict(dim_mults=(2, 4)), "dim_mults = (2, 4) must start with 1"),
        (dict(init_dim=9, memory_efficient=True), "memory_efficient needs init_dim = 9"),
        (dict(init_conv_kernel_size=4), "init_conv_kernel_size = 4 must be odd"),
        (dict(dim=9, norm="group"), "norm='group' has 8 groups"),
        (dict(init_cross_embed_kernel_sizes=(3, 4)), "every size must be odd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_in_a_unet(fields, message):
    complains(UnetConfig, dict(dim=8, dim_mults=[1, 2]) | fields, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(noise_schedule="cosine"), "did you mean 'noise_schedules'?"),
        (dict(noise_schedules="cosin"), "noise_schedules must be one of 'cosine', 'linear'"),
        (
            dict(pred_objectives="eps"),
            "pred_objectives must be one of 'noise', 'v', 'x_start' or a tuple of these",
        ),
        (dict(loss_type="mse"), "loss_type must be one of 'l1', 'l2', 'huber', got 'mse'"),
        (dict(unets=[dict(dim=8, dimm=1)]), "UnetConfig has no field 'dimm'"),
        (dict(unets=math.inf), "ImagenConfig.unets must be"),
        (dict(unets=["demo"]), "got ('demo',) (tuple)"),
        (dict(min_snr_gamma=math.inf), "min_snr_gamma must be a finite number"),
        (dict(unets=[]), "give one size for each of 0 unets"),
        (dict(image_sizes=(8,)), "image_sizes = (8,): give one size for each of 2 unets"),
        (dict(timesteps=(1, 2, 3)), "timesteps = (1, 2, 3) has 3 entries for 2 unets"),
        (dict(pred_objectives=("v",)), "pred_objectives = ('v',) has 1 entries for 2 unets"),
        (dict(min_snr_gamma=(1.0,) * 3), "min_snr_gamma = (1.0, 1.0, 1.0) has 3 entries"),
        (dict(random_crop_sizes=4), "random_crop_sizes[0] must be None, got 4"),
        (
            dict(random_crop_sizes=(None, 18)),
            "U-Net 2: crops of 18 x 18 pixels are larger than its images, 16 x 16",
        ),
        (
            dict(random_crop_sizes=(None, 5)),
            "U-Net 2 downsamples by 2; its size 5",
        ),
        (dict(image_sizes=((8, 12), 24)), "all stages must have the same aspect ratio; 24 x 24"),
        (
            dict(image_sizes=((8, 12, 3), 24)),
            "image_sizes must be an int or (an int, an int) or a",
        ),
        (dict(image_sizes=(0, 16)), "U-Net 1: the size 0 x 0 must be positive"),
        (dict(image_sizes=((8, 13), (16, 26))), "its size 8 x 13 is not a multiple"),
        (dict(image_sizes=(7, 16)), "U-Net 1 downsamples by 2; its size 7 x 7"),
        (dict(unets=[SMALL.to_dict(), NULL.to_dict()]), "only be the first"),
        (dict(cond_drop_prob=1.5), "cond_drop_prob = 1.5 must lie in"),
        (dict(dynamic_thresholding_percentile=95), "dynamic_thresholding_percentile = 95"),
        (dict(timesteps=0), "timesteps = 0 must be positive"),
        (
            dict(elucidated=dict(lowres_conditioning="raw")),
            "must be one of 'log_snr', 'time'",
        ),
        (dict(only_train_unet_number=3), "only_train_unet_number = 3 is not in 1 .. 2"),
        (dict(text_encoder_name="my-t5"), "width of text_encoder_name = 'my-t5' is not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_in_a_cascade(fields, message):
    unets = [dict(dim=8, dim_mults=[1, 2])] * 2
    complains(ImagenConfig, dict(unets=unets, image_sizes=[8, 16]) | fields, message)


def test_a_command_says_it_in_one_line(tmp_path):
    file = tmp_path / "cascade.json"
    file.write_text(json.dumps(presets.tiny().to_dict() | dict(noise_schedules="cosin")))
    command = [sys.executable, "-m", "train.base", "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: {file}: ImagenConfig.noise_schedules must be one of 'cosine', 'linear'"
    )
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_stage():
    with pytest.raises(ValueError, match="unet_number = 0 is not in 1 .. 2"):
        cascade().stage(0)


def complains(kind, data, message):
    """One line, and it says what is wrong."""
    with pytest.raises(ValueError) as error:
        kind.from_dict(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ignored_fields_warn_once(monkeypatch):
    monkeypatch.setattr(unet_config, "_warned", set())
    with pytest.warns(UserWarning, match="UnetConfig.dropout = 0.1 has no effect") as caught:
        UnetConfig(dim=8, dropout=0.1)
    assert len(caught) == 1
    UnetConfig(dim=8, dropout=0.2)  # a second warning would be an error here
    with pytest.warns(UserWarning, match="num_image_tokens"):
        UnetConfig(dim=8, dropout=0.2, num_image_tokens=3)
