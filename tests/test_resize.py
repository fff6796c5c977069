"""Every mode against torch's interpolation, enlarging and shrinking, by odd ratios too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imagen_jax.resize import nearest_indices, resize

IMAGE = np.random.default_rng(0).uniform(size=(2, 12, 12, 3)).astype(np.float32)


def torchs(image, size, mode):
    out = F.interpolate(torch.from_numpy(np.moveaxis(image, -1, 1).copy()), size, mode=mode)
    return np.moveaxis(out.numpy(), 1, -1)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
def test_matches_torch(mode):
    for size in (1, 3, 5, 7, 11, 13, 24, 31):
        got = resize(IMAGE, size, mode=mode)
        np.testing.assert_allclose(got, torchs(IMAGE, size, mode), atol=2e-6, err_msg=str(size))


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
def test_oblong_matches_torch(mode):
    image = IMAGE[:, :5]
    np.testing.assert_allclose(resize(image, 7, mode=mode), torchs(image, 7, mode), atol=2e-6)


def test_nearest_picks_torchs_pixels():
    for n_in in range(1, 70):
        line = torch.arange(n_in, dtype=torch.float32)[None, None]
        for n_out in range(1, 70):
            want = F.interpolate(line, n_out, mode="nearest")[0, 0].numpy()
            np.testing.assert_array_equal(nearest_indices(n_in, n_out), want)


def test_reference_returns_early_and_clips_late(reference_resize):
    wild = 3 * IMAGE - 1
    for size, mode in ((12, "bicubic"), (24, "bicubic"), (6, "nearest")):
        want = reference_resize(
            torch.from_numpy(np.moveaxis(wild, -1, 1).copy()),
            size,
            clamp_range=(0.0, 1.0),
            mode=mode,
        )
        got = resize(wild, size, mode=mode, clamp=(0.0, 1.0))
        np.testing.assert_allclose(got, np.moveaxis(want.numpy(), 1, -1), atol=5e-6)
    assert resize(wild, 12, clamp=(0.0, 1.0)) is wild


@pytest.fixture
def reference_resize():
    from imagen_jax.interop.reference import import_imagen_pytorch

    return import_imagen_pytorch().imagen_pytorch.resize_image_to


def test_nearest_keeps_dtypes():
    for image in (IMAGE > 0.5, (255 * IMAGE).astype(np.uint8)):
        got = resize(image, 6)
        assert got.dtype == image.dtype
        np.testing.assert_array_equal(got, image[:, ::2, ::2])


def test_jits_and_differentiates():
    """The transpose spreads a pixel's gradient over what it was made of: the weights sum to one."""
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(resize(x, 5, mode="bilinear"))))(IMAGE)
    np.testing.assert_allclose(jnp.sum(gradient), 5 * 5 * 2 * 3, rtol=1e-5)


def test_empty_size():
    with pytest.raises(ValueError, match="size = 0"):
        resize(IMAGE, 0)
