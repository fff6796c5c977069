"""State dicts of wrapped modules are read without the wrappers' names, and weights that are not
finite are refused by the name of the tensor."""

import json

import numpy as np
import pytest
import torch

from imagen_jax.errors import UserError
from imagen_jax.interop import imagen_pytorch
from tests.interop import states
from tests.interop.states import saved
from tests.interop.support import interop


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


def lightning(state):
    inner = renamed(state, "imagen.".__add__) | {"perceptual.weight": torch.zeros(2)}
    return {"state_dict": inner, "epoch": 3}


WRAPPED = {
    "parallel": (lambda state: renamed(state, "module.".__add__), ["'module' is removed"]),
    "compiled": (
        lambda state: renamed(state, lambda name: name.replace("unets.0.", "unets.0._orig_mod.")),
        ["'_orig_mod' is removed"],
    ),
    "both": (lambda state: renamed(state, "module._orig_mod.".__add__), ["module", "_orig_mod"]),
    "lightning": (
        lightning,
        ["read: state_dict", "epoch", "'imagen.' is removed", "1 tensors outside", "perceptual"],
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_state_dicts_are_looked_into_and_said(name, tmp_path):
    data, (wrap, notes) = states.trainers_file(), WRAPPED[name]
    plain = imagen_pytorch.read(saved(tmp_path / "plain.pt", data))
    config = tmp_path / "config.json"
    config.write_text(imagen_json(plain))
    source = imagen_pytorch.read(saved(tmp_path / "x.pt", wrap(data["model"])), config)
    assert all(any(note in said for said in source.notes) for note in notes), source.notes
    for got, want in zip(source.online, plain.online, strict=True):
        assert got.keys() == want.keys()
        assert all(np.array_equal(got[key], want[key]) for key in want)
    whole = data | {"model": renamed(data["model"], "module.".__add__)}
    assert imagen_pytorch.read(saved(tmp_path / "whole.pt", whole)).online[1].keys() == want.keys()


def imagen_json(source) -> str:
    return json.dumps({"type": "original", "imagen": source.origin["imagen_params"]})


def test_a_single_wrapped_unet(tmp_path):
    state = states.state_of(states.UNET)
    for number, prefix in enumerate(("module.", "model.unet.")):
        wrapped = saved(tmp_path / f"{number}.pt", renamed(state, prefix.__add__))
        with pytest.raises(UserError, match="its tensors do not determine these fields"):
            imagen_pytorch.read(wrapped)  # as the plain file: fields are asked for, no name is


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    data = states.trainers_file()
    good = saved(tmp_path / "good.pt", data)
    interop("from-torch", good, tmp_path / "run")
    interop("to-safetensors", tmp_path / "run", tmp_path / "good.safetensors")
    data["model"]["unets.1.final_conv.bias"][2] = torch.nan
    bad = saved(tmp_path / "bad.pt", data)
    message = r"bad.pt: unets.1.final_conv.bias holds NaN or infinity \(1 of 3 values\)"
    for arguments in (
        ("from-torch", bad, tmp_path / "out"),
        ("from-torch", bad, tmp_path / "out", "--verify"),
        ("verify", bad, tmp_path / "run"),
    ):
        with pytest.raises(UserError, match=message):
            interop(*arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="must be a local path"):
        interop("from-torch", good, "gs://bucket/run")
    with pytest.raises(UserError, match=message):
        imagen_pytorch.load(bad)
    content = (tmp_path / "good.safetensors").read_bytes()
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content[:-4] + np.float32(np.inf).tobytes())
    with pytest.raises(UserError, match="bad.safetensors, U-Net .* holds NaN or infinity"):
        interop("from-safetensors", file, tmp_path / "out")
