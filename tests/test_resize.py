"""Every mode against torch's interpolation, up and down, by odd ratios and per axis."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imagen_jax.resize import nearest_indices, resize
from imagen_jax.types import pair

IMAGE = np.random.default_rng(0).uniform(size=(2, 12, 12, 3)).astype(np.float32)
MODES = ["nearest", "bilinear", "bicubic", "area"]


def torchs(image, size, mode):
    out = F.interpolate(torch.from_numpy(np.moveaxis(image, -1, 1).copy()), size, mode=mode)
    return np.moveaxis(out.numpy(), 1, -1)


@pytest.mark.parametrize("mode", MODES)
def test_matches_torch(mode):
    for size in (1, 3, 5, 7, 11, 13, 24, 31):
        got = resize(IMAGE, size, mode=mode)
        np.testing.assert_allclose(got, torchs(IMAGE, size, mode), atol=2e-6, err_msg=str(size))


@pytest.mark.parametrize("mode", MODES)
def test_each_axis_matches_torch(mode):
    """Landscape, portrait and square inputs; outputs that keep, scale or invert the aspect."""
    for image in (IMAGE, IMAGE[:, :5], IMAGE[:, :, :8]):
        h, w = image.shape[1:3]
        for size in ((7, 7), (3, 8), (24, 5), (h, 20), (20, w), (h, 4), (2 * h, 2 * w), (w, h)):
            got = resize(image, size, mode=mode)
            assert got.shape[1:3] == size
            message = f"{h}x{w} -> {size}"
            want = torchs(image, size, mode)
            np.testing.assert_allclose(got, want, atol=2e-6, err_msg=message)


def test_an_image_of_the_right_width_only_is_resized():
    image = IMAGE[:, :6]
    np.testing.assert_array_equal(resize(image, 12), image.repeat(2, axis=1))
    np.testing.assert_array_equal(resize(image, (3, 12)), image[:, ::2])
    assert resize(image, (6, 12)) is image


def test_one_integer_means_a_square():
    assert pair(8) == (8, 8) and pair((8, 12)) == (8, 12)
    for mode in MODES:
        np.testing.assert_array_equal(resize(IMAGE, 7, mode=mode), resize(IMAGE, (7, 7), mode=mode))


def test_nearest_picks_torchs_pixels():
    for n_in in range(1, 70):
        line = torch.arange(n_in, dtype=torch.float32)[None, None]
        for n_out in range(1, 70):
            want = F.interpolate(line, n_out, mode="nearest")[0, 0].numpy()
            np.testing.assert_array_equal(nearest_indices(n_in, n_out), want)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int32, bool])
def test_nearest_is_bit_equal_to_the_gather(dtype):
    """However an axis is computed; 3 -> 123 is a multiple that torch does not repeat evenly."""
    rng = np.random.default_rng(1)
    sizes = [(3, 123), (2, 82), (3, 6), (3, 8), (8, 3), (8, 2), (8, 1), (1, 5), (4, 4)]
    for (h, h_out), (w, w_out) in zip(sizes, sizes[::-1], strict=True):
        image = rng.integers(0, 200, (2, h, w, 3)).astype(dtype)
        got = resize(image, (h_out, w_out))
        rows, columns = nearest_indices(h, h_out), nearest_indices(w, w_out)
        assert got.dtype == image.dtype
        np.testing.assert_array_equal(got, image[:, rows[:, None], columns])
    line = torch.arange(3, dtype=torch.float32)[None, None]
    want = F.interpolate(line, 123, mode="nearest")[0, 0].numpy()
    np.testing.assert_array_equal(nearest_indices(3, 123), want)
    assert (want != np.arange(3).repeat(41)).any()


def test_regular_nearest_needs_no_gather():
    for size in ((24, 36), (6, 4), (24, 3)):
        program = jax.make_jaxpr(lambda x, size=size: resize(x, size))(IMAGE)
        assert "gather" not in str(program), size
    assert "gather" in str(jax.make_jaxpr(lambda x: resize(x, 7))(IMAGE))


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
    """A pixel's gradient is distributed over its inputs: the weights sum to one."""
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(resize(x, 5, mode="bilinear"))))(IMAGE)
    np.testing.assert_allclose(jnp.sum(gradient), 5 * 5 * 2 * 3, rtol=1e-5)


def test_empty_size():
    for size in (0, (4, 0), (0, 4)):
        with pytest.raises(ValueError, match=re.escape(f"size = {size} must be positive.")):
            resize(IMAGE, size)
