"""Sampling: the whole cascade against imagen-pytorch's `Imagen.sample` with the noises given, to
1e-3 in [0, 1]; and what the compiled loop promises."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image as PILImage

from imagen_jax import nn, sampling
from imagen_jax.config import NullUnetConfig
from imagen_jax.diffusion import samplers
from imagen_jax.imagen import Imagen
from imagen_jax.resize import resize
from tests import cascades
from tests.cascades import cascade
from tests.compilations import PROGRAMS, compilations

RANDOM = np.random.default_rng(0)
BATCH = 2
TEXT = dict(
    text_embeds=RANDOM.standard_normal((BATCH, 4, cascades.WIDTH), np.float32),
    text_masks=np.arange(4) < np.array([[4], [2]]),
)
PICTURES = RANDOM.uniform(size=(BATCH, 7, 7, 3)).astype(np.float32)
MASKS = RANDOM.uniform(size=(BATCH, 7, 7)) < 0.5
MIXED = dict(
    unet=dict(self_cond=True, cond_images_channels=2),
    pred_objectives=("v", "x_start"),
    noise_schedules=("linear", "cosine"),
    lowres_noise_schedule="cosine",
    dynamic_thresholding=(False, True),
    timesteps=(6, 4),
    resize_mode="bilinear",
)
COND_IMAGES = RANDOM.integers(0, 256, (BATCH, 6, 6, 2), np.uint8)
UNCONDITIONAL = dict(unet=dict(cond_on_text=False), condition_on_text=False)
NOT_NORMALISED = UNCONDITIONAL | dict(auto_normalize_img=False, dynamic_thresholding=False)
INPAINT = dict(inpaint_images=PICTURES, inpaint_masks=MASKS)
KEYS = jax.random.split(jax.random.key(9), 3)


@dataclasses.dataclass(frozen=True)
class Case:
    """What differs from the plainest cascade, what `sample` is told, and how many steps it makes.

    `ours` is told to ours only.
    """

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    told: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: tuple[int | None, int | None] = (5, 5)
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = [
    Case("unguided"),
    Case("guided", told=dict(cond_scale=3.0)),
    Case("one guidance each", told=dict(cond_scale=(1.0, 4.0), cfg_keep_parallel_frac=0.3)),
    Case("plain guidance", told=dict(cond_scale=2.5, cfg_remove_parallel_component=False)),
    Case(
        "beginning with pictures",
        told=dict(init_images=PICTURES, skip_steps=2, lowres_sample_noise_level=0.4),
        steps=(3, 3),
    ),
    Case(
        "beginning with a picture once",
        told=dict(init_images=(PICTURES, None), skip_steps=(1, None)),
        steps=(4, 5),
    ),
    Case("first stage only", told=dict(stop_at_unet_number=1), steps=(5, None)),
    Case(
        "second stage only",
        told=dict(start_at_unet_number=2, start_image_or_video=PICTURES),
        steps=(None, 5),
    ),
    Case("mixed", config=MIXED, told=dict(cond_images=COND_IMAGES), steps=(6, 4)),
    Case(
        "mixed, guided",
        config=MIXED,
        told=dict(cond_images=COND_IMAGES, cond_scale=2.0, cfg_keep_parallel_frac=0.5),
        steps=(6, 4),
    ),
    Case(
        "inpainting",
        config=MIXED,
        told=dict(INPAINT, cond_images=COND_IMAGES, inpaint_resample_times=2, cond_scale=2.0),
        steps=(6, 4),
        ours=dict(inpaint_variance="reference"),
    ),
    Case(
        "inpainting without text",
        config=NOT_NORMALISED,
        told=dict(INPAINT, inpaint_resample_times=3),
        ours=dict(inpaint_variance="reference"),
    ),
]


def noises_for(config, steps, told) -> list[np.ndarray]:
    """As many as the reference will draw; None steps is a stage that does not run."""
    random = np.random.default_rng(3)
    times = told.get("inpaint_resample_times")
    return [
        random.standard_normal(
            (1 + i + samplers.count_noises(n, resample_times=times), BATCH, size, size, 3),
            np.float32,
        )
        for i, (n, size) in enumerate(zip(steps, config.image_sizes, strict=True))
        if n is not None
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case):
    config = cascade(**case.config)
    told = case.told | (TEXT if config.condition_on_text else {})
    draws = noises_for(config, case.steps, told)
    told["return_all_unet_outputs"] = True
    want = cascades.reference_sample(cascades.theirs(config), draws, **told)
    got = cascades.ours(config).sample(draws=draws, **told, **case.ours)
    assert len(got) == len(want) == len(draws)
    low = 0.0 if config.auto_normalize_img else -1.0
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, cascades.to_numpy(theirs), rtol=0, atol=1e-3)
        assert ours.min() >= low and ours.max() <= 1 and np.std(ours) > 0.05


# ---- what comes out


@functools.cache
def plain() -> Imagen:
    return cascades.ours(cascade())


def draw(seed=0, imagen=None, **told):
    imagen = plain() if imagen is None else imagen
    return imagen.sample(key=jax.random.key(seed), **TEXT | told)


def test_a_negative_text_replaces_the_absent_one():
    """Guided away from its own text an image is not guided; a blank text is an absent one."""
    same = dict(negative_text_embeds=TEXT["text_embeds"], negative_text_masks=TEXT["text_masks"])
    other = dict(same, negative_text_embeds=TEXT["text_embeds"][::-1])
    blank = dict(same, negative_text_masks=np.zeros_like(TEXT["text_masks"]))
    guided = draw(cond_scale=4.0)
    np.testing.assert_allclose(draw(cond_scale=4.0, **same), draw(), atol=1e-4)
    np.testing.assert_allclose(draw(cond_scale=4.0, **blank), guided, atol=1e-5)
    assert np.abs(draw(cond_scale=4.0, **other) - guided).max() > 0.05
    np.testing.assert_array_equal(draw(**other), draw())  # unguided, there is nothing to negate


def test_guidance_by_noise_level():
    guided = draw(cond_scale=4.0)
    np.testing.assert_allclose(
        draw(cond_scale=4.0, guidance_interval=(0.0, 1e9)), guided, atol=1e-5
    )
    np.testing.assert_allclose(
        draw(cond_scale=4.0, guidance_interval=(1e8, 1e9)), draw(), atol=1e-5
    )
    np.testing.assert_allclose(
        draw(cond_scale=4.0, guidance_schedule=(1.0, 1.0)), guided, atol=1e-4
    )
    for other in (dict(guidance_schedule="linear"), dict(guidance_rescale=0.7)):
        found = draw(cond_scale=4.0, **other)
        assert np.isfinite(found).all() and np.abs(found - guided).max() > 0.02


def test_strength_starts_from_the_noised_image():
    """In `sampling.start`: alpha x_0 + sigma z at the level of the first step that is left."""
    config, picture = cascade(timesteps=8), PICTURES[:, :5, :5]
    stage = config.stage(1)
    grid = samplers.make_grid(stage.process, 8, skip_steps=6)
    noise = np.random.default_rng(0).standard_normal((1, *picture.shape), np.float32)
    program = sampling.Program(stage=stage, dtype=jnp.float32, guided=False, sampler="ancestral")
    network = cascades.ours(config).unets[0]
    given = sampling.Given(source_images=picture, **TEXT)
    state, *_ = sampling.start(
        nn.params_of(network), given, sampling.Randomness(noises=noise), grid,
        program=program, batch_size=BATCH,
    )  # fmt: skip
    level = stage.process.level(grid.positions[:1])
    want = level.alpha * (2 * picture - 1) + level.sigma * noise[0]
    np.testing.assert_allclose(state.x, want, atol=1e-5)
    near = draw(init_images=(picture, None), strength=0.2, stop_at_unet_number=1)
    far = draw(init_images=(picture, None), strength=1.0, stop_at_unet_number=1)
    assert np.abs(near - picture).mean() < np.abs(far - picture).mean()


def test_pil_images():
    draws = noises_for(cascade(), (5, 5), {})
    theirs = cascades.reference_sample(
        cascades.theirs(cascade()), draws, return_pil_images=True, **TEXT
    )
    ours = plain().sample(draws=draws, return_pil_images=True, **TEXT)
    assert [image.size for image in ours] == [(8, 8)] * BATCH
    for one, other in zip(ours, theirs, strict=True):
        difference = np.asarray(one, np.int32) - np.asarray(other, np.int32)
        assert np.abs(difference).max() <= 1  # torchvision rounds down
    pictures = draw(return_all_unet_outputs=True, return_pil_images=True)
    assert [[image.size[0] for image in stage] for stage in pictures] == [[5, 5], [8, 8]]
    assert isinstance(pictures[0][0], PILImage.Image)


def test_same_key_same_picture():
    first = draw(0)
    np.testing.assert_array_equal(first, draw(0))
    assert np.abs(first - draw(1)).max() > 0.1


def test_the_exact_variance_keeps_known_pixels():
    told = dict(INPAINT, inpaint_resample_times=2, stop_at_unet_number=1)
    out = draw(**told)
    known, mask = (np.asarray(resize(image, 5)) for image in (PICTURES, MASKS[..., None]))
    mask = mask[..., 0]
    np.testing.assert_allclose(out[mask], known[mask], atol=1e-7)
    other = draw(**told, inpaint_variance="reference")
    assert np.abs(out - other)[~mask].max() > 1e-3


def test_unconditional_batch():
    imagen = cascades.ours(cascade(**UNCONDITIONAL))
    sample = functools.partial(imagen.sample, key=jax.random.key(0), stop_at_unet_number=1)
    assert sample(batch_size=3).shape == (3, 5, 5, 3)
    masks = dict(inpaint_images=PICTURES, inpaint_masks=MASKS, inpaint_resample_times=1)
    assert len(sample(**masks)) == BATCH


def test_ddim_ignores_the_noises_of_its_steps():
    draws = noises_for(cascade(), (5, 5), {})
    other = [np.concatenate([d[: 1 + i], 1 - d[1 + i :]]) for i, d in enumerate(draws)]
    sample = functools.partial(plain().sample, sampler="ddim", **TEXT)
    first = sample(draws=draws)
    np.testing.assert_array_equal(first, sample(draws=other))
    assert np.abs(first - sample(draws=draws, eta=1.0)).max() > 1e-3
    assert np.abs(sample(draws=draws, eta=1.0) - sample(draws=other, eta=1.0)).max() > 1e-3


def test_bfloat16_is_close():
    config = cascade(pred_objectives="v")
    exact = cascades.ours(config)
    unets = [
        nn.bind(unet.config, nnx.to_pure_dict(nnx.split(unet)[1]), dtype=jnp.bfloat16)
        for unet in exact.unets
    ]
    coarse = draw(imagen=Imagen(config, unets=unets), stop_at_unet_number=1)
    fine = draw(imagen=exact, stop_at_unet_number=1)
    assert coarse.dtype == jnp.float32
    assert np.mean(np.abs(coarse - fine)) < 0.02


def test_a_cascade_without_its_base():
    config = cascade()
    config = dataclasses.replace(config, unets=(NullUnetConfig(), config.unets[1]))
    imagen = Imagen(config, unets=[nn.NullUnet(), plain().unets[1]])
    with pytest.raises(ValueError, match="U-Net 1 has no weights"):
        draw(imagen=imagen)
    start = dict(start_at_unet_number=2, start_image_or_video=(PICTURES * 255).astype(np.uint8))
    assert draw(imagen=imagen, **start).shape == (BATCH, 8, 8, 3)


# ---- the compiled loop


def test_numbers_compile_nothing(caplog):
    """Neither another seed, text, guidance, number of steps nor threshold."""
    config = cascade(pred_objectives=("x_start", "v"))
    first = cascades.ours(config)
    changed = dict(timesteps=9, dynamic_thresholding_percentile=0.5, lowres_sample_noise_level=0.1)
    second = cascades.ours(dataclasses.replace(config, **changed))
    with compilations(caplog) as names:
        before = draw(imagen=first, cond_scale=3.0)
    assert PROGRAMS <= set(names)
    assert len([name for name in names if name == "jit(advance)"]) == 2
    with compilations(caplog) as names:
        draw(1, imagen=first, cond_scale=(5.0, 2.0), cfg_keep_parallel_frac=0.5)
        draw(2, imagen=first, cond_scale=3.0, text_embeds=1 - TEXT["text_embeds"])
        draw(0, imagen=first, cond_scale=3.0, timesteps=(3, 30), skip_steps=(0, 4))
        after = draw(0, imagen=second, cond_scale=3.0)
        draw(0, imagen=first, cond_scale=3.0, lowres_sample_noise_level=0.5)
    assert names == []
    assert np.abs(before - after).max() > 1e-3
    with compilations(caplog) as names:
        draw(imagen=first, cond_scale=(1.0, 3.0))
    assert names.count("jit(advance)") == 1


def test_a_stage_is_compiled_for_its_own_fields(caplog):
    """Another second stage, encoder or training probability leaves the first as it is."""
    config = cascade(pred_objectives=("x_start", "noise"), timesteps=3)
    draw(imagen=cascades.ours(config))
    other = dataclasses.replace(
        config,
        pred_objectives=("x_start", "v"),
        text_encoder_name="t5-small",
        only_train_unet_number=1,
    )
    with compilations(caplog) as names:
        draw(imagen=cascades.ours(other))
    assert names.count("jit(advance)") == names.count("jit(start)") == 1


# ---- an image is a function of its own key


def alone(key, row: int, **given):
    text = {name: array[row : row + 1] for name, array in TEXT.items()}
    return plain().sample(key=key, cond_scale=2.0, **text | given)[0]


@pytest.mark.parametrize("given", [{}, dict(sampler="ddim", eta=0.5)])
def test_an_image_depends_on_its_own_key_alone(given):
    """To the bit beside other images, to rounding at another place or in another batch size."""
    both = plain().sample(key=KEYS[:2], cond_scale=2.0, **TEXT | given)
    text = TEXT | dict(text_embeds=TEXT["text_embeds"] * np.float32([[[1]], [[-2]]]))
    beside_another = plain().sample(key=KEYS[::2], cond_scale=2.0, **text | given)
    np.testing.assert_array_equal(both[0], beside_another[0])
    swapped = {name: array[::-1] for name, array in TEXT.items()}
    other = plain().sample(key=KEYS[:2][::-1], cond_scale=2.0, **swapped | given)
    np.testing.assert_allclose(both, other[::-1], atol=1e-5)
    for row in range(BATCH):
        np.testing.assert_allclose(alone(KEYS[row : row + 1], row, **given), both[row], atol=1e-4)
    assert np.abs(alone(KEYS[2:], 0, **given) - both[0]).max() > 0.1


def test_inpainting_depends_on_its_own_key_alone():
    given = dict(inpaint_resample_times=2)
    both = plain().sample(key=KEYS[:2], cond_scale=2.0, **TEXT | INPAINT | given)
    own = {name: array[1:] for name, array in INPAINT.items()}
    np.testing.assert_allclose(alone(KEYS[1:2], 1, **own, **given), both[1], atol=1e-4)


def test_slices_make_no_difference(monkeypatch):
    whole = {}
    for slices in (1, 2, 20):
        monkeypatch.setattr(sampling, "SLICES", slices)
        whole[slices] = draw(timesteps=7)
    np.testing.assert_array_equal(whole[1], whole[2])
    np.testing.assert_array_equal(whole[1], whole[20])


def test_progress(monkeypatch):
    calls = []
    draw(timesteps=(3, 2), progress=lambda *call: calls.append(call))
    assert calls == [(1, 0, 3), (1, 1, 3), (1, 2, 3), (1, 3, 3), (2, 0, 2), (2, 1, 2), (2, 2, 2)]
    monkeypatch.setattr(sampling, "SLICES", 2)
    calls.clear()
    draw(stop_at_unet_number=1, skip_steps=1, progress=lambda *call: calls.append(call))
    assert calls == [(1, 0, 4), (1, 2, 4), (1, 4, 4)]


def test_raising_in_progress_stops():
    class Enough(Exception):
        pass

    calls = []

    def progress(*call):
        calls.append(call)
        if call == (1, 2, 5):
            raise Enough

    with pytest.raises(Enough):
        draw(progress=progress)
    assert calls[-1] == (1, 2, 5)


# ---- mistakes


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (dict(text_embeds=np.full((2, 4, 6), np.nan)), "text_embeds hold NaN"),
        (dict(text_embeds=None), "give texts or text_embeds"),
        (dict(text_embeds=np.ones((2, 4, 5), np.float32)), "5 wide, but text_embed_dim is 6"),
        (dict(key=None), "either a key or draws"),
        (dict(draws=[np.zeros((1, 2, 5, 5, 3))]), "either a key or draws"),
        (dict(key=None, draws=[np.zeros((1, 2, 5, 5, 3))]), "1 sequences of draws for 2 stages"),
        (
            dict(key=None, draws=[np.zeros((5, 2, 5, 5, 3))], stop_at_unet_number=1),
            "5 noises; this stage needs 6",
        ),
        (dict(cond_scale=(1.0, 2.0, 3.0)), "cond_scale has 3 entries for 2 unets"),
        (dict(timesteps=[3]), "timesteps has 1 entries for 2 unets"),
        (dict(skip_steps=5), "skip_steps = 5 of num_steps = 5"),
        (dict(timesteps=0), "num_steps = 0"),
        (dict(inpaint_images=PICTURES), "both inpaint_images and inpaint_masks"),
        (dict(inpaint_masks=MASKS), "both inpaint_images and inpaint_masks"),
        (
            dict(inpaint_images=PICTURES[:1], inpaint_masks=MASKS[:1]),
            "text_embeds 2, inpaint_images 1, inpaint_masks 1",
        ),
        (dict(start_at_unet_number=2), "needs start_image_or_video"),
        (
            dict(start_at_unet_number=2, start_image_or_video=PICTURES[:1]),
            "text_embeds 2, start_image_or_video 1",
        ),
        (
            dict(start_at_unet_number=2, stop_at_unet_number=1),
            r"start_at_unet_number \(2\) must not exceed stop_at_unet_number \(1\)",
        ),
        (dict(start_at_unet_number=3), "1 .. 2"),
        (dict(start_at_unet_number=0), "1 .. 2"),
        (dict(stop_at_unet_number=3), "1 .. 2"),
        (dict(cond_images=COND_IMAGES), "cond_images are given"),
        (dict(sampler="DDIM"), "sampler 'DDIM' is not one of .*; did you mean 'ddim'"),
        (dict(sampler="euler"), "sampler 'euler' is not one of"),
        (dict(batch_size=3), "batch sizes differ: text_embeds 2, batch_size 3"),
        (dict(init_images=PICTURES[:1]), "text_embeds 2, init_images of U-Net 1 1"),
        (dict(init_images=(None, PICTURES[:1])), "text_embeds 2, init_images of U-Net 2 1"),
        (dict(sigma_min=0.1), "sigma_min and sigma_max are for elucidated cascades"),
        (
            dict(init_images=PICTURES[:, :5]),
            r"init_images of U-Net 1 must be square.*\(2, 5, 7, 3\)",
        ),
        (dict(cond_images=COND_IMAGES[:, :3]), "cond_images must be square"),
        (
            dict(inpaint_images=PICTURES[:, :5], inpaint_masks=MASKS),
            r"inpaint_images must be square, \(b, h, w, c\); got \(2, 5, 7, 3\)",
        ),
        (
            dict(inpaint_images=PICTURES, inpaint_masks=MASKS[:, :5]),
            r"inpaint_masks must be square, \(b, h, w\); got \(2, 5, 7\)",
        ),
        (
            dict(start_at_unet_number=2, start_image_or_video=PICTURES[:, :, :5]),
            "start_image_or_video must be square",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_errors(told, message):
    given = dict(key=jax.random.key(0)) | TEXT | told
    with pytest.raises(ValueError, match=message) as error:
        plain().sample(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "told", "message"),
    [
        (dict(cond_drop_prob=0.0), dict(TEXT, cond_scale=2.0), "cond_drop_prob"),
        (UNCONDITIONAL, TEXT, "condition_on_text is off"),
    ],
)
def test_errors_of_other_cascades(config, told, message):
    with pytest.raises(ValueError, match=message):
        cascades.ours(cascade(**config)).sample(key=jax.random.key(0), **told)
