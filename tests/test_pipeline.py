"""A loaded cascade: its dtype, its mesh, and images that depend on their own seeds alone."""

import dataclasses
import gc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import imagen_jax
from commands.sampling import Sampling
from imagen_jax import ElucidatedConfig, memory, nn, presets, run_config, sampling
from imagen_jax.call_arguments import check_output
from imagen_jax.errors import UserError
from imagen_jax.imagen import Imagen
from imagen_jax.pipeline import Embeddings, Pipeline, padded, sampling_defaults
from imagen_jax.streams import RUN, image_seeds, row_keys, stream
from tests.compilations import PROGRAMS, compilations
from tests.sample.conftest import cascade, save_run

STEPS = dict(timesteps=3, cond_scale=(2.0, 1.0))
SEEDS = [5, 6, 7]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The tiny cascade with the smallest networks, no parameter at zero."""
    config = dataclasses.replace(cascade(), timesteps=3)
    return save_run(tmp_path_factory.mktemp("run"), config)


@pytest.fixture(scope="module")
def embeddings(run) -> Embeddings:
    return Pipeline.load(run).encode(["a red apple", "a pear", "a long blue boat"], batch_size=2)


def images(pipeline: Pipeline, embeddings: Embeddings, rows, **arguments) -> np.ndarray:
    given = Embeddings(*(part[rows] for part in embeddings))
    found = dict(pipeline.generate(given, seeds=[SEEDS[r] for r in rows], **STEPS | arguments))
    assert list(found) == list(range(len(rows)))
    return np.stack([found[i] for i in range(len(rows))])


def test_an_image_is_the_same_in_any_batch_and_on_any_mesh(run, embeddings):
    together = images(Pipeline.load(run), embeddings, [0, 1, 2])
    assert together.shape == (3, 16, 16, 3) and np.std(together) > 0.05
    parts = images(Pipeline.load(run), embeddings, [0, 1, 2], batch_size=2)
    np.testing.assert_allclose(parts, together, atol=1e-4)
    np.testing.assert_allclose(
        images(Pipeline.load(run), embeddings, [2])[0], together[2], atol=1e-4
    )
    for mesh in ("2x1", "2x2"):
        spread = Pipeline.load(run, mesh=mesh)
        np.testing.assert_allclose(images(spread, embeddings, [0, 1, 2]), together, atol=1e-4)
        encoded = spread.encode(["a red apple"])
        np.testing.assert_allclose(encoded.embeds[0], embeddings.embeds[0], atol=1e-4)
    leaf = nn.params_of(spread.imagen.unets[0])["mid_block1"]["block1"]["project"]["kernel"]
    assert len(leaf.sharding.device_set) == 4


def test_weights_are_kept_in_the_sampling_dtype_with_the_same_results(run, embeddings):
    """Casting once gives to the bit what casting at every step gives."""
    once = Pipeline.load(run, dtype="bfloat16")
    each_step = imagen_jax.load(run, dtype=jnp.bfloat16)
    params = nn.params_of(once.imagen.unets[0])
    assert params["mid_block1"]["block1"]["project"]["kernel"].dtype == jnp.bfloat16
    assert params["mid_block1"]["block1"]["norm"]["gamma"].dtype == jnp.float32
    assert params["time"]["fourier"]["weights"].dtype == jnp.float32
    got = images(once, embeddings, [0, 1, 2], pad_to=3)
    want = each_step.sample(
        key=jax.vmap(jax.random.key)(jnp.array(SEEDS)),
        text_embeds=embeddings.embeds,
        text_masks=embeddings.masks,
        **sampling_defaults(each_step.config) | STEPS,
    )
    np.testing.assert_array_equal(got, want)


def test_the_paper_sized_weights_take_half():
    """5.74 GiB for the three networks in bfloat16, and no kernel is left to cast in the loop."""
    size = 0
    for unet in presets.imagen().unets:
        stored = jax.tree.leaves(nn.stored_shapes(nn.abstract(unet)[1], jnp.bfloat16))
        assert all(x.dtype == jnp.bfloat16 for x in stored if len(x.shape) > 1)
        size += sum(x.size * x.dtype.itemsize for x in stored)
    assert 5.7 < size / 2**30 < 5.8


def test_seeds():
    assert image_seeds(7, 3)[0] == 7 and image_seeds(7, 3) == image_seeds(7, 5)[:3]
    every = [seed for first in range(50) for seed in image_seeds(first, 20)]
    assert len(set(every)) == len(every) and max(every) < 2**32


def test_no_two_streams_share_a_key():
    """Of a run, of its U-Nets, of its steps; of the rows and purposes of sampling; nor do
    they equal a key split or folded by small numbers."""
    key = jax.random.key(0)
    keys = [stream(key, name, unet, i) for name in RUN for unet in (1, 2) for i in range(3)]
    keys += [stream(key, name, unet) for name in RUN for unet in (1, 2)]
    keys += list(row_keys(key, 4)) + list(jax.random.split(key, 4))
    keys += [jax.random.fold_in(key, i) for i in range(4, 8)]
    for name in ("times", "noise", "lowres_noise", "keep_mask", "network", "text_drop"):
        keys.append(stream(key, name))
    data = {tuple(np.asarray(jax.random.key_data(one)).tolist()) for one in keys}
    assert len(data) == len(keys)


def test_the_library_holds_one_encoder_of_the_networks_dtype(run, embeddings):
    imagen = imagen_jax.load(run, dtype=jnp.bfloat16)
    embeds, masks = imagen.encode_text(["a red apple", "a pear"])
    np.testing.assert_array_equal(masks, embeddings.masks[:2])
    np.testing.assert_allclose(embeds, embeddings.embeds[:2], atol=0.1)
    encoder = weakref.ref(imagen.encoder)
    assert encoder() is imagen.encoder and encoder().dtype == jnp.bfloat16
    imagen.release_encoder()
    gc.collect()
    assert encoder() is None


@pytest.mark.parametrize("mesh", [None, "2x1"])
def test_streamed_weights_are_on_the_device_while_their_network_runs(run, mesh):
    """At every step only one network's weights are there, and the images are the same."""
    drawn, there, sizes = {}, {}, {}
    for way in ("resident", "streamed"):
        gc.collect()
        before, there[way] = on_device(), {}
        pipeline = Pipeline.load(run, mesh=mesh, memory=way)

        def look(number, step, *_, before=before, there=there[way]):
            gc.collect()
            there[number] = max(there.get(number, 0), on_device() - before)

        embeddings = pipeline.encode(["a red apple"])
        drawn[way] = images(pipeline, embeddings, [0], on_step=look)
        sizes = {n: memory.nbytes(nn.params_of(pipeline.imagen.unets[n - 1])) for n in (1, 2)}
        sizes["encoder"] = memory.nbytes(pipeline.encoder.params)
        del pipeline
    np.testing.assert_array_equal(drawn["streamed"], drawn["resident"])
    for number in (1, 2):
        elsewhere = sum(sizes.values()) - sizes[number]
        if mesh is None:
            assert there["resident"][number] - there["streamed"][number] == elsewhere


def on_device() -> int:
    """Bytes in the first device's memory; arrays that share a buffer count once."""
    buffers = {}
    for x in jax.live_arrays():
        if x.sharding.memory_kind == "device" and x.sharding.device_set == {jax.devices()[0]}:
            buffers[x.unsafe_buffer_pointer()] = x.nbytes
    return sum(buffers.values())


def test_auto_streams_what_takes_more_than_half_of_the_device(monkeypatch):
    assert not memory.streams("auto", 2**60)  # a CPU does not say how much it has
    assert memory.streams("streamed", 1) and not memory.streams("resident", 2**60)

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 16 * 2**30}

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert memory.streams("auto", 9 * 2**30) and not memory.streams("auto", 7 * 2**30)


def test_a_run_refuses_another_encoder(run, tmp_path):
    """What was saved with an encoder records it, and is used with no other."""
    imagen = imagen_jax.load(run)
    imagen.encode_text(["a red apple"])
    imagen_jax.save(tmp_path, imagen)
    recorded = run_config.read_text_encoder(tmp_path)
    assert recorded == imagen.encoder.identity and run_config.read_text_encoder(run) is None
    assert Pipeline.load(tmp_path).encoder.identity == recorded
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace(recorded.sha256, "0" * 64))
    for use in (Pipeline.load(tmp_path), imagen_jax.load(tmp_path, unet_numbers=())):
        with pytest.raises(ValueError, match="'demo' .* is not that of this cascade") as caught:
            use.encoder  # noqa: B018
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="weights differ"):
        run_config.write(tmp_path, imagen.config, text_encoder=recorded)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(mesh="16x1"), "needs 16 devices, found 8"),
        (dict(mesh="x"), "--mesh x: must be auto"),
    ],
)
def test_mistakes(run, given, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.load(run, **given)


# ---- calls as in diffusers


def test_a_call(run):
    """One image a prompt and number; its seed alone repeats it; the reference's names do too."""
    pipeline = Pipeline.load(run)
    few = dict(num_inference_steps=(3, 2), guidance_scale=(9.0, 1.0))
    result = pipeline(
        ["a pear", "a boat"], num_images_per_prompt=2, seed=7, output_type="np", **few
    )
    assert result.prompts == ["a pear", "a pear", "a boat", "a boat"]
    assert result.seeds == image_seeds(7, 4) and len(result.images) == 4
    named = dict(texts=["a boat"], cond_scale=(9.0, 1.0), timesteps=(3, 2))
    alone = pipeline(seeds=result.seeds[3:], output_type="np", **named)
    np.testing.assert_allclose(alone.images[0], result.images[3], atol=1e-4)
    (image,) = pipeline("a pear", negative_prompt="a boat", seed=7, **few).images
    assert image.size == (16, 16) and image.mode == "RGB"
    plain = np.rint(255 * np.clip(result.images[0], 0, 1))
    assert np.abs(np.asarray(image) - plain).mean() > 1
    blank = pipeline("a pear", negative_prompt=" ", seed=7, **few).images[0]
    assert np.abs(np.asarray(blank) - plain).max() <= 1
    for mistake, message in (
        (dict(texts=["x"]), "prompt and texts are the same"),
        (dict(timesteps=2, num_inference_steps=2), "num_inference_steps and timesteps"),
        (dict(seeds=[1, 2]), "2 seeds for 1 images"),
        (dict(seed=2**32), "seed 4294967296 must lie in 0 .. 4294967295"),
        (dict(seeds=[-1]), "seed -1 must lie in"),
        (dict(negative_prompt=["x", "y"]), "2 negative prompts for 1 prompts"),
        (dict(num_images_per_prompt=0), "nothing to draw"),
        (dict(key=jax.random.key(0)), "key is not an argument of a pipeline: give seed"),
        (dict(generator=None), "generator is not an argument of a pipeline: give seed"),
        (dict(width=64), "width is not an argument of a pipeline: the cascade determines"),
        (dict(inpaint_images=np.zeros((2, 16, 16, 3))), "inpaint_images has 2 rows for 1 images"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline("a pear", **mistake)
    with pytest.raises(UserError, match="output_type 'latent' is not one of 'pil', 'np'"):
        check_output("latent")


def test_arrays_have_a_row_an_image_or_a_prompt(run, monkeypatch):
    """Three prompts make a batch of four; of several stages an entry is a list."""
    pipeline, seen = Pipeline.load(run), []

    def sample(self, *, batch_size, inpaint_images, return_all_unet_outputs=False, **_):
        assert len(inpaint_images) == batch_size
        seen.extend(inpaint_images[:, 0, 0, 0])
        images = np.zeros((batch_size, 4, 4, 3))
        return [images, images] if return_all_unet_outputs else images

    monkeypatch.setattr(Imagen, "sample", sample)
    pictures = np.arange(3.0)[:, None, None, None] * np.ones((1, 16, 16, 3))
    prompts = ["a pear", "a boat", "a red apple"]
    for each in (1, 2):
        seen.clear()
        given = dict(num_images_per_prompt=each, inpaint_images=pictures)
        assert len(pipeline(prompts, **given).images) == 3 * each
        assert seen[: 3 * each] == np.repeat([0, 1, 2], each).tolist()
    result = pipeline(prompts, inpaint_images=pictures, return_all_unet_outputs=True)
    assert [image.size for image in result.images[2]] == [(4, 4), (4, 4)]


def test_what_is_missing_is_said_before_anything_is_drawn(run, monkeypatch):
    monkeypatch.setattr(sampling, "sample_stage", lambda *_, **__: pytest.fail("it draws"))
    with pytest.raises(UserError, match="U-Net 2 has no weights"):
        Pipeline.load(run, unet_numbers=[1])("a pear")
    with pytest.raises(UserError, match="not one string"):
        imagen_jax.load(run).sample(texts="pear", key=jax.random.key(0))


def test_the_callback_sees_every_step(run):
    seen = []

    def callback(unet_number, step, steps, estimates):
        seen.append((unet_number, step, steps, np.asarray(estimates).shape))

    pipeline = Pipeline.load(run)
    result = pipeline("a pear", num_inference_steps=(25, 2), callback_on_step_end=callback)
    first = [(1, step, 25, (1, 8, 8, 3)) for step in range(1, 26)]
    assert seen == first + [(2, step, 2, (1, 16, 16, 3)) for step in (1, 2)]
    again = pipeline("a pear", num_inference_steps=(25, 2))
    difference = np.asarray(again.images[0]).astype(int) - np.asarray(result.images[0])
    assert np.abs(difference).max() <= 1

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline("a pear", num_inference_steps=2, callback_on_step_end=stop)


def test_few_steps_are_the_default():
    found = sampling_defaults(presets.imagen())
    assert found["timesteps"] == (20, 15, 10) and found["cond_scale"] == (3.0, 1.0, 1.0)
    assert (found["sampler"], found["spacing"]) == ("dpm++2m", "log_snr")
    edm = dataclasses.replace(presets.imagen(), elucidated=ElucidatedConfig())
    assert sampling_defaults(edm)["spacing"] == "karras"  # that of Karras et al.
    # A command's defaults are the library's; a cascade in discrete steps has a sampler of its own.
    discrete = Sampling(checkpoint=Path("run")).options(presets.paper())
    assert (discrete["sampler"], discrete["cond_scale"]) == ("dpm++2m-sde", (7.0, 4.0, 4.0))
    plain = dataclasses.replace(presets.imagen(), cond_drop_prob=0.0)
    assert sampling_defaults(plain)["cond_scale"] == (1.0, 1.0, 1.0)


def test_batches_have_few_sizes_and_warm_up_compiles_them(run, caplog):
    assert [padded(count, 8) for count in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert [padded(count, 6) for count in (3, 5, 6)] == [4, 6, 6]
    pipeline = Pipeline.load(run)
    pipeline.warm_up(batch_size=4, sampler="ddim")
    with compilations(caplog) as names:
        prompts = ["a pear", "a boat", "a red apple"]
        pipeline(prompts, num_inference_steps=(7, 5), guidance_scale=(2.0, 1.0), sampler="ddim")
    assert not PROGRAMS & set(names)
