"""Makes imagen-pytorch, the reference, importable offline and with a CPU build of torch.

Only the parity tests, the benchmarks and the converter need it. Two things prevent a plain import:
PyPI's torchvision is built for CUDA and lacks two operators with a CPU torch, and the reference
looks up the configuration of a T5 on a model hub while it is being imported.
"""

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from imagen_jax.config import T5_WIDTHS, UnetConfig

_NEEDED = (
    "imagen-pytorch cannot be imported ({}): `make test-env` installs it, or see REFERENCE in the "
    "Makefile for the packages."
)
_libraries: list[Any] = []  # torch forgets a library's operators when the object dies


@functools.cache
def import_imagen_pytorch() -> ModuleType:
    """The module `imagen_pytorch` (2.1.0).

    Raises ImportError with one line that says what to install. Warnings from the import itself
    (torch.jit, pydantic) are suppressed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _import_torchvision()
            with _t5_configs_without_a_hub():
                import imagen_pytorch
        except ImportError as error:
            raise ImportError(_NEEDED.format(error)) from error
    return imagen_pytorch


def build_unet(config: UnetConfig) -> Any:
    """The reference's `Unet` for a configuration, a `torch.nn.Module`, freshly initialised.

    Two things that the reference cannot build are made possible: `cross_embed_downsample`, for
    which it passes the output width as the kernel sizes, and `norm="group"`, which it had until
    1.26.
    """
    module = import_imagen_pytorch().imagen_pytorch
    original = module.CrossEmbedLayer

    def cross_embed(dim_in, dim_out=None, *, kernel_sizes, stride=2):
        return original(dim_in, kernel_sizes, dim_out, stride)

    with contextlib.ExitStack() as patches:
        patches.enter_context(contextlib.redirect_stdout(None))  # its advice on the width
        patches.enter_context(mock.patch.object(module, "CrossEmbedLayer", cross_embed))
        if config.norm == "group":
            patches.enter_context(mock.patch.object(module, "Block", _group_norm_block()))
        arguments = dataclasses.asdict(config)
        del arguments["norm"]
        return module.Unet(**arguments)


@functools.cache
def _group_norm_block() -> type:
    """The convolution block of the reference before 2.0."""
    import torch

    class GroupNormBlock(torch.nn.Module):
        def __init__(self, dim, dim_out):
            super().__init__()
            self.groupnorm = torch.nn.GroupNorm(8, dim)
            self.project = torch.nn.Conv2d(dim, dim_out, 3, padding=1)

        def forward(self, x, scale_shift=None):
            x = self.groupnorm(x)
            if scale_shift is not None:
                x = x * (scale_shift[0] + 1) + scale_shift[1]
            return self.project(torch.nn.functional.silu(x))

    return GroupNormBlock


def _import_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401


@contextlib.contextmanager
def _t5_configs_without_a_hub() -> Iterator[None]:
    import transformers

    def from_pretrained(name: str, *_, **__):
        return transformers.T5Config(d_model=T5_WIDTHS[name])

    original = transformers.T5Config.__dict__.get("from_pretrained")
    transformers.T5Config.from_pretrained = staticmethod(from_pretrained)
    try:
        yield
    finally:
        if original is None:
            del transformers.T5Config.from_pretrained
        else:
            transformers.T5Config.from_pretrained = original
