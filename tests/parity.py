"""imagen-pytorch's U-Net and ours with the same weights and the same inputs."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch

from imagen_jax.config import UnetConfig
from imagen_jax.interop import keys
from imagen_jax.interop.reference import build_unet, import_imagen_pytorch
from imagen_jax.nn import abstract
from imagen_jax.types import Params

torch.set_num_threads(1)  # the workers of the test run share the processor

IMAGES = ("x", "lowres_cond_img", "cond_images", "self_cond")


def reference_unet(config: UnetConfig, seed: int = 3) -> torch.nn.Module:
    """The reference's U-Net of a configuration, in eval mode, no parameter at its initial value.

    Another seed may draw a badly conditioned network: with 0 and 1 the reference's own float32
    differs from its float64 by up to 2e-4 in outputs and 8e-4 in gradients, more than ours does.
    """
    unet = build_unet(config)
    randomise(unet, seed)
    return unet.eval()


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Gains around one, biases around zero, kernels of unit gain: nothing stays zero or one."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=random)
            leaf = name.rpartition(".")[2]
            if leaf in ("g", "gamma", "q_scale", "k_scale") or (leaf == "weight" and p.ndim == 1):
                p.copy_(1 + 0.2 * noise)
            elif leaf == "bias":
                p.copy_(0.2 * noise)
            elif leaf == "weight" and "pos_emb" not in name:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.5 * noise)


def state_dict(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def our_params(reference: torch.nn.Module, config: UnetConfig) -> Params:
    return keys.to_jax(state_dict(reference), abstract(config)[1])


def to_torch(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of our U-Net as those of the reference: NHWC to NCHW, no keep mask."""
    tensors = {
        name: torch.from_numpy(np.moveaxis(a, -1, 1).copy() if name in IMAGES else a)
        if isinstance(a, np.ndarray)
        else a
        for name, a in inputs.items()
        if name != "keep_mask"
    }
    return tensors


@contextlib.contextmanager
def keep_mask(mask: np.ndarray | None) -> Iterator[None]:
    """The reference keeps the text of these rows, whatever it would have drawn."""
    if mask is None:
        yield
        return
    module = import_imagen_pytorch().imagen_pytorch
    with mock.patch.object(module, "prob_mask_like", lambda *_, **__: torch.from_numpy(mask)):
        yield


def forward(reference: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The reference's output, NCHW, for the inputs of ours."""
    with keep_mask(inputs.get("keep_mask")):
        return reference(**to_torch(inputs))
