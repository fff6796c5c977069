"""Files as imagen-pytorch writes them, and the command line as a user types it."""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from imagen_jax.interop.__main__ import main
from imagen_jax.interop.reference import import_imagen_pytorch
from tests import parity

SEED = 3  # see `parity.reference_unet`: other seeds may draw badly conditioned networks


def interop(*arguments: Any) -> str:
    """What `python -m imagen_jax.interop ARGUMENTS` prints; the command runs in this process."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["imagen_jax.interop", *map(str, arguments)]),
        contextlib.redirect_stdout(printed),
    ):
        main()
    return printed.getvalue()


@contextlib.contextmanager
def lenient() -> Iterator[io.StringIO]:
    """The reference's warnings (its config classes use pydantic's old names) are no errors here;
    gives what it prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
        warnings.simplefilter("ignore")
        yield printed


def create(
    params: Mapping[str, Any], *, elucidated: bool = False, seed: int = SEED
) -> torch.nn.Module:
    """The reference's cascade from its config class, every parameter random."""
    module = import_imagen_pytorch()
    build = module.ElucidatedImagenConfig if elucidated else module.ImagenConfig
    with lenient():
        imagen = build(**params).create()
    for number, unet in enumerate(imagen.unets):
        parity.randomise(unet, seed + number)
    return imagen


def make_trainer(imagen: torch.nn.Module, *, use_ema: bool = True) -> Any:
    make = import_imagen_pytorch().ImagenTrainer
    with lenient():
        return make(imagen, use_ema=use_ema, accelerate_cpu=True, verbose=False)


def trained(imagen: torch.nn.Module, steps: Sequence[int], *, use_ema: bool = True) -> Any:
    """The trainer of a cascade as after so many steps: averages that differ from the weights, and
    counters that tell them apart."""
    trainer = make_trainer(imagen, use_ema=use_ema)
    trainer.steps.copy_(torch.tensor(steps))
    for index, (ema, step) in enumerate(zip(trainer.ema_unets, steps, strict=use_ema)):
        parity.randomise(ema.ema_model, SEED + 10 + index)
        ema.initted.fill_(step > 0)
        ema.step.fill_(step + 3)
    return trainer


def tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of nested dictionaries, by dotted names."""
    found = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors(value).items()}
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return found


def assert_same_tensors(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """The same names, dtypes, shapes and bits."""
    got, want = tensors(got), tensors(want)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert bits(got[name]) == bits(tensor), name


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)
