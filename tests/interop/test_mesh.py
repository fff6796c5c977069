"""A file of imagen-pytorch straight onto a mesh: four emulated devices, a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from imagen_jax.config import ImagenConfig, UnetConfig
from tests import SMALLEST_UNET
from tests.interop import states

PROGRAM = """
import sys
import jax, numpy as np
from flax import nnx
from imagen_jax import sharding
from imagen_jax.interop import imagen_pytorch

def leaves(imagen):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.split(imagen)[1]))

mesh = sharding.make_layout("2x2", rows=2).mesh
whole = leaves(imagen_pytorch.load(sys.argv[1]))
split = leaves(imagen_pytorch.load(sys.argv[1], mesh=mesh))
for a, b in zip(whole, split, strict=True):
    np.testing.assert_array_equal(a, b)
    assert b.sharding.device_set == set(jax.devices())
parts = {x.addressable_shards[0].data.size / x.size for x in split}
assert parts == {1, 1 / 4}, parts
"""


def test_each_device_gets_its_part(tmp_path):
    unet = UnetConfig(**SMALLEST_UNET | dict(dim=128), cond_dim=8, max_text_len=5)
    config = ImagenConfig(unets=unet, image_sizes=8, text_embed_dim=6)
    file = tmp_path / "imagen.pt"
    torch.save(states.trainers_file(config), file)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, file],
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | flags,
    )
