"""Versions 1.22 to 1.26: group normalisation, which 2.x loads in part and without an error."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from imagen_jax import checkpoint, run_config
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.interop import configuration, keys, verify
from imagen_jax.interop.reference import build_unet
from tests import SMALLEST_UNET, parity
from tests.interop.states import saved
from tests.interop.support import (
    assert_same_tensors,
    create,
    interop,
    lenient,
    make_trainer,
    read,
)

UNET = UnetConfig(
    **SMALLEST_UNET | dict(dim=16), cond_dim=8, max_text_len=6, text_embed_dim=6, norm="group"
)
CASCADE = ImagenConfig(unets=(UNET, UNET), image_sizes=(4, 8), text_embed_dim=6)


@pytest.fixture(scope="module")
def legacy(tmp_path_factory) -> Path:
    """A file as `ImagenTrainer.save` of 1.26 makes it, with what ema-pytorch of that time stored:
    counters of one element, `initted` as a float."""
    _, params = configuration.to_theirs(CASCADE)
    model, ema = {}, {}
    for i, unet in enumerate(CASCADE.unets):
        online = parity.state_dict(parity.reference_unet(unet, 3 + i))
        mean = parity.state_dict(parity.reference_unet(unet, 100 + i))
        model |= {f"unets.{i}.{name}": torch.from_numpy(a) for name, a in online.items()}
        ema |= {f"{i}.initted": torch.tensor([1.0]), f"{i}.step": torch.tensor([13])}
        ema |= {f"{i}.online_model.{name}": torch.from_numpy(a) for name, a in online.items()}
        ema |= {f"{i}.ema_model.{name}": torch.from_numpy(a) for name, a in mean.items()}
    data = dict(
        model=model,
        version="1.26.2",
        steps=torch.tensor([11, 12]),
        optim0={},
        ema=ema,
        imagen_type="original",
        imagen_params=params,
    )
    return saved(tmp_path_factory.mktemp("legacy") / "imagen.pt", data)


@pytest.fixture(scope="module")
def converted(legacy) -> tuple[Path, str]:
    run = legacy.with_name("run")
    return run, interop("from-torch", legacy, run, "--verify")


def test_it_converts_and_gives_the_forward_of_its_version(converted):
    run, printed = converted
    config = run_config.read(run)
    assert [unet.norm for unet in config.unets] == ["group", "group"]
    assert config == CASCADE
    for which in ("ema", "online"):
        assert f"verify (a), {which}: all" in printed
        for number in (1, 2):
            assert f"verify (b), {which}, U-Net {number}: " in printed
            assert checkpoint.latest_step(run, number) == 10 + number
    assert "optimiser's state is not converted" in printed


def test_it_goes_back_bit_for_bit_and_says_that_2x_cannot_load_it(legacy, converted, tmp_path):
    printed = interop("to-torch", converted[0], tmp_path / "back.pt", "--verify")
    assert "2.x loads them only in part, without an error. Load the file with 1.26." in printed
    back, original = read(tmp_path / "back.pt"), read(legacy)
    assert_same_tensors(back, original)
    for name in ("version", "imagen_type", "imagen_params"):
        assert back[name] == original[name]


def test_2x_itself_loads_it_only_in_part(legacy):
    """Why it is converted here with care: `ImagenTrainer.load` leaves every norm as it was, and
    all that tells of it is a line."""
    original = read(legacy)
    with lenient():
        trainer = make_trainer(create(original["imagen_params"]))
    before = {name: tensor.clone() for name, tensor in trainer.imagen.state_dict().items()}
    with lenient() as printed, contextlib.redirect_stderr(io.StringIO()):
        trainer.load(str(legacy), only_model=True)
    assert "Failed loading state dict. Trying partial load" in printed.getvalue()
    untouched = 0
    for name, tensor in trainer.imagen.state_dict().items():
        if name in original["model"]:
            torch.testing.assert_close(tensor, original["model"][name], rtol=0, atol=0)
        else:
            assert ".norm.gamma" in name
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
            untouched += 1
    assert untouched == sum(name.endswith("groupnorm.weight") for name in original["model"]) > 20


# imagen-pytorch 1.26.2 itself, `Unet` of UNET randomised as `parity.reference_unet` does, on the
# inputs of `verify.make_inputs`: [with text or without, sample, 0, 1, channel].
OUTPUTS = [
    [[-0.32542032, -1.2924502, 1.7892605], [-0.9504339, -0.9104197, 0.9575999]],
    [[-0.0448106, -0.55994713, 1.2452935], [-0.18118048, 0.11195965, 1.5086354]],
]


def test_the_forward_is_that_of_1_26_2():
    state = parity.state_dict(parity.reference_unet(UNET))
    ours = verify.outputs(UNET, keys.to_jax(state, keys.target(UNET)))
    np.testing.assert_allclose(ours[:, :, 0, 1], OUTPUTS, rtol=0, atol=2e-5)
    theirs = verify.reference_outputs(UNET, state)
    np.testing.assert_allclose(theirs[:, :, 0, 1], OUTPUTS, rtol=0, atol=2e-6)


def persisted(file: Path, groups: int | list[int]) -> Path:
    """As `persist_to_file` of 1.26, whose constructor had `resnet_groups` besides."""
    config = dataclasses.asdict(UNET)
    del config["norm"]
    data = dict(
        config=config | dict(resnet_groups=groups), state_dict=build_unet(UNET).state_dict()
    )
    return saved(file, data)


def test_other_groups_than_eight_are_refused(tmp_path):
    """They have the same names and shapes, and would give other pictures."""
    (tmp_path / "c.json").write_text(json.dumps(dict(image_sizes=[4], pred_objectives="noise",
        noise_schedules="cosine", text_encoder_name="ours")))  # fmt: skip
    for number, groups in enumerate((8, [8])):
        file = persisted(tmp_path / f"{number}.pt", groups)
        interop("from-torch", file, tmp_path / f"{number}", "--config", tmp_path / "c.json")
        config = run_config.read(tmp_path / f"{number}")
        assert config.unets[0] == dataclasses.replace(UNET, channels_out=3)
    file = persisted(tmp_path / "4.pt", 4)
    with pytest.raises(ValueError, match="resnet_groups = 4: only the default, 8"):
        interop("from-torch", file, tmp_path / "4", "--config", tmp_path / "c.json")
    plain = saved(tmp_path / "plain.pt", read(file)["state_dict"])
    with pytest.raises(ValueError, match='"resnet_groups": 8'):
        interop("from-torch", plain, tmp_path / "4", "--config", tmp_path / "c.json")
    assert not (tmp_path / "4").exists()
