"""Runs of a few steps in this process: what they leave, and that resuming changes nothing."""

import dataclasses
import errno
import importlib
import io
import json
import shutil
import signal
import tarfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from imagen_jax import checkpoint, flops, nn, presets, run_config
from imagen_jax.data import open_source, scenes
from imagen_jax.data.records import hashed_heldout, key_hashes
from imagen_jax.errors import UserError
from imagen_jax.evaluation import bin_labels
from imagen_jax.imagen import Imagen
from tests.train import support
from train import log, loop
from train.feed import Feed
from train.log import Metrics, Window
from train.previews import Previews
from train.settings import Optimization
from train.step import make_train_step, step_flops

KEYS = ("step", "loss", "grad_norm", "learning_rate")
LOOKED_AT = dict(sample_every=4, sample_steps=2, compose_every=4, compose_images=8)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps without a stop."""
    settings = support.settings(tmp_path_factory.mktemp("straight"), **LOOKED_AT)
    assert loop.run(settings, 1)
    return settings


def assert_same_run(settings, straight, again=()):
    """Parameters, average, optimiser and metrics of step 4, bit for bit; `again` are the steps
    that were taken twice."""
    for item in ("params", "ema", "opt_state"):
        support.assert_equal(
            support.saved(settings.run, 4, item), support.saved(straight.run, 4, item)
        )
    got, want = (
        [[line[key] for key in KEYS] for line in support.metrics(run)]
        for run in (settings.run, straight.run)
    )
    assert len(want) == 4
    assert sorted(got) == sorted(want + [want[step - 1] for step in again])


def test_a_resumed_run_is_the_uninterrupted_one(straight, tmp_path, capsys):
    programs = make_train_step(
        support.CASCADE.stage(1), straight.section(Optimization)
    )._cache_size()
    first = support.settings(tmp_path, steps=2, resume=True)
    assert loop.run(first, 1)
    began = "has no checkpoint of U-Net 1: starting at step 0"
    assert began in capsys.readouterr().out
    assert loop.run(dataclasses.replace(first, steps=4, resume=True), 1)
    assert began not in capsys.readouterr().out
    assert_same_run(first, straight)
    assert (
        make_train_step(support.CASCADE.stage(1), straight.section(Optimization))._cache_size()
        == programs
    )


def test_a_signal_saves_and_the_run_goes_on(straight, tmp_path, monkeypatch, capsys):
    settings = support.settings(tmp_path)
    write = Metrics.write

    def write_and_interrupt(metrics, step, kind, values):
        write(metrics, step, kind, values)
        if (step, kind) == (2, "train"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Metrics, "write", write_and_interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert not loop.run(settings, 1)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.latest_step(settings.run, 1) == 3
    assert "SIGINT: stopped after step 3" in capsys.readouterr().out
    monkeypatch.undo()
    assert loop.run(dataclasses.replace(settings, resume=True), 1)
    assert_same_run(settings, straight)
    assert loop.run(dataclasses.replace(settings, resume=True), 1)
    assert "has all of its 4 steps" in capsys.readouterr().out


def test_lines_are_means_of_the_same_steps(tmp_path):
    """Wherever a run was interrupted; the line of its end is one more, of the steps since."""
    means = {}
    for name, stops in (("straight", (7,)), ("stopped", (1, 2, 5, 7))):
        (tmp_path / name).mkdir()
        told = dict(log_every=3, save_every=100, resume=True)
        settings = support.settings(tmp_path / name, **told)
        for steps in stops:
            assert loop.run(dataclasses.replace(settings, steps=steps), 1)
        lines = support.metrics(settings.run)
        means[name] = {line["step"]: [line[key] for key in KEYS[1:]] for line in lines}
        assert set(means[name]) == {3, 6, *stops}
    assert all(means["stopped"][step] == line for step, line in means["straight"].items())


@pytest.mark.parametrize("during", ["evaluation", "write_samples", "compose"])
def test_what_a_signal_kept_from_being_looked_at_is_made_up_for(
    straight, tmp_path, monkeypatch, capsys, during
):
    """A signal is heard in the middle of it; the resumed run leaves what it would have."""
    settings = support.settings(tmp_path, save_every=3, **LOOKED_AT)
    if during == "evaluation":
        embed = Feed.evaluation

        def evaluation(feed, source, count):
            if checkpoint.latest_step(settings.run, 1) is not None:  # not the one at step 0
                signal.raise_signal(signal.SIGTERM)
            yield from embed(feed, source, count)

        monkeypatch.setattr(Feed, "evaluation", evaluation)
    else:
        look = getattr(Previews, during)

        def stopped(previews, params, step, progress):
            def interrupted(number, done, total):
                signal.raise_signal(signal.SIGTERM)
                progress(number, done, total)

            look(previews, params, step, interrupted)

        monkeypatch.setattr(Previews, during, stopped)
    assert not loop.run(settings, 1)
    assert "SIGTERM: stopped after step 4" in capsys.readouterr().out
    assert checkpoint.latest_step(settings.run, 1) == 4
    picture = settings.run / "samples" / "unet1-0000004.png"
    assert picture.exists() == (during == "compose")
    monkeypatch.undo()
    assert loop.run(dataclasses.replace(settings, resume=True), 1)
    assert_same_run(settings, straight)
    names = [name for name in support.metrics(straight.run, "eval/train")[-1] if "loss" in name]
    for kind in ("eval/heldout", "eval/train"):
        got, want = (support.metrics(run, kind) for run in (settings.run, straight.run))
        assert [line["step"] for line in got] == [0, 4]
        assert [got[-1][name] for name in names] == [want[-1][name] for name in names]
    [got], [want] = (
        support.metrics(run, "eval/composition") for run in (settings.run, straight.run)
    )
    assert got.items() - want.items() <= {("time", got["time"])}
    assert picture.read_bytes() == (straight.run / "samples" / picture.name).read_bytes()
    capsys.readouterr()
    assert loop.run(dataclasses.replace(settings, resume=True), 1)
    assert "has all of its 4 steps" in capsys.readouterr().out


def test_what_a_run_leaves(straight):
    assert run_config.read(straight.run) == support.CASCADE
    recorded = json.loads((straight.run / "config.json").read_text())["training"]["unet1"]
    assert recorded["steps"] == 4 and recorded["pictures"] == 8
    evaluations = support.metrics(straight.run, "eval/heldout")
    assert [line["step"] for line in evaluations] == [0, 4]
    bins = [evaluations[-1][f"loss[{label}]"] for label in bin_labels()]
    assert len(bins) == 10 and any(bins) and evaluations[-1]["loss[0..2.5]"] > 0
    assert len(support.metrics(straight.run, "eval/train")) == 2
    with Image.open(straight.run / "samples" / "unet1-0000004.png") as picture:
        assert picture.width > 300
    assert support.metrics(straight.run)[-1]["images_per_second"] > 0


def empty(step: Path) -> None:
    """As a power cut leaves files that were renamed before they reached the disk."""
    for file in Path(step / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def cut(step: Path) -> None:
    (step / "meta" / "metadata").write_text('{"step')


@pytest.mark.parametrize("damage", [empty, cut])
def test_a_damaged_step_is_set_aside(straight, tmp_path, damage, capsys):
    settings = support.settings(tmp_path, save_every=1, steps=3)
    assert loop.run(settings, 1)
    damage(settings.run / "unet1" / "3")
    on = dataclasses.replace(settings, resume=True, steps=4)
    assert loop.run(on, 1)
    assert "damaged" in (said := capsys.readouterr().out) and "Resuming from step 2." in said
    assert_same_run(on, straight, again=[3])
    assert (settings.run / "unet1" / "3.damaged").is_dir()
    for step in (1, 2, 3, 4):
        damage(settings.run / "unet1" / str(step))
    with pytest.raises(ValueError, match="damaged.* No older step .* can be read"):
        loop.run(dataclasses.replace(on, steps=5), 1)
    assert checkpoint.steps(settings.run, 1) == [4, 3, 2, 1]


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ESTALE, "Stale file handle"), ValueError("UNAVAILABLE: Error opening ...")],
    ids=["disk", "store"],
)
def test_a_step_that_cannot_be_read_now_is_not_set_aside(straight, tmp_path, failure):
    """A disk or a store that fails says nothing of what is saved: no older step takes its place."""
    shutil.copytree(straight.run, tmp_path / "run")
    on = dataclasses.replace(straight, workdir=tmp_path / "run", resume=True, steps=5)
    saved = checkpoint.steps(on.run, 1)
    with (
        mock.patch.object(ocp.StandardCheckpointer, "restore", side_effect=failure),
        pytest.raises(
            UserError, match=r"cannot be read now; run the command again: .*(Stale|UNAVAILABLE)"
        ),
    ):
        loop.run(on, 1)
    assert checkpoint.steps(on.run, 1) == saved


def test_who_is_warned_of_drifting_colours():
    """Memory-efficient super-resolution that predicts noise, learned variance or not."""
    paper, imagen, scenes_ = (presets.PRESETS[name]() for name in ("paper", "imagen", "scenes"))
    assert [log.drifts(paper.stage(number)) for number in (1, 2, 3)] == [False, True, True]
    assert not any(log.drifts(scenes_.stage(number)) for number in (1, 2, 3))
    noise = dataclasses.replace(imagen, pred_objectives="noise")
    assert log.drifts(noise.stage(2)) and not log.drifts(imagen.stage(2))


def test_mistakes(straight, tmp_path):
    again = dataclasses.replace(straight, steps=6)
    captions = tmp_path / "captions.txt"
    chosen = [record.caption for record in open_source("bundled").split("train").take(8)]
    captions.write_text("\n".join(reversed(chosen)))
    on = dataclasses.replace(again, resume=True)
    mistakes = {
        "is at step 4: continue with --resume": again,
        "--seed was 0 and is 1": dataclasses.replace(on, seed=1),
        "--batch-size was 4 and is 8": dataclasses.replace(on, batch_size=8),
        "--limit was 8 and is 9": dataclasses.replace(on, limit=9),
        "--data bundled, --captions-from .*: not the pictures": dataclasses.replace(
            on, captions_from=captions
        ),
        "--optimizer was adam and is adafactor": dataclasses.replace(on, optimizer="adafactor"),
        "describes another cascade: unets.0.dim is 8 there, 16 here": dataclasses.replace(
            on, config=support.other_cascade(tmp_path)
        ),
        "no source 'nowhere'": support.settings(tmp_path, data=("nowhere",)),
        "--mesh 16x1: 16x1 needs 16 devices, found 8": support.settings(tmp_path, mesh="16x1"),
        "--mesh 8x1: 4 images a step do not split": support.settings(tmp_path, mesh="8x1"),
        "remat = 'all' is not one of nothing_saveable,": support.settings(tmp_path, remat="all"),
    }
    before = (straight.run / "config.json").read_text()
    assert run_config.read_text_encoder(straight.run).name == "demo"
    for message, settings in mistakes.items():
        with pytest.raises(ValueError, match=message):
            loop.run(settings, 1)
    with pytest.raises(ValueError, match="unet_number = 3 is not in 1 .. 2"):
        loop.run(support.settings(tmp_path), 3)
    assert checkpoint.latest_step(straight.run, 1) == 4
    assert (straight.run / "config.json").read_text() == before


def test_weights_alone_can_be_taken_over(straight, tmp_path):
    settings = support.settings(tmp_path, init_from=Path(straight.run), steps=1, lr=1e-12)
    loop.run(settings, 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9),
        support.saved(settings.run, 1),
        support.saved(straight.run, 4, "ema"),
    )
    other = support.settings(
        tmp_path, config=support.other_cascade(tmp_path), init_from=Path(straight.run)
    )
    with pytest.raises(ValueError, match="unets.0.dim is 8 there, 16 here"):
        loop.run(dataclasses.replace(other, workdir=tmp_path / "other"), 1)
    with pytest.raises(ValueError, match="has no weights of U-Net 2"):
        loop.run(dataclasses.replace(settings, workdir=tmp_path / "second"), 2)


def test_weights_alone_cannot_be_resumed(straight, tmp_path):
    params = support.saved(straight.run, 4)
    unets = [nn.bind(support.UNET_OF[1], params), nn.NullUnet()]
    settings = support.settings(tmp_path, resume=True)
    checkpoint.save(settings.run, Imagen(support.CASCADE, unets=unets))
    with pytest.raises(ValueError, match="contains only weights: .* --init-from"):
        loop.run(settings, 1)


def test_bad_pictures_are_skipped_counted_and_named(tmp_path, capsys):
    """Corrupt, small and without a caption, all of the held-out ones among them: never fatal."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [f"{i}.png" for i in range(12)]
    heldout = [
        name for name, out in zip(names, hashed_heldout(key_hashes(names), 0.3), strict=True) if out
    ]
    good = [name for name in names if name not in heldout]
    assert heldout and len(good) > 4
    for i, name in enumerate(names):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text("red")
    for name in (*heldout, good[0]):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    Image.new("RGB", (5, 5)).save(folder / good[1])
    (folder / good[2]).with_suffix(".txt").write_text(" ")
    (folder / good[3]).write_bytes((folder / good[3]).read_bytes()[:-30])  # seen by decoding alone
    (folder / "13.psd").write_bytes(b"not read")
    settings = support.settings(tmp_path, data=(str(folder),), limit=None, heldout_fraction=0.3)
    assert loop.run(settings, 1)
    printed, err = capsys.readouterr()
    before, _, after = printed.partition("devices: ")
    assert f"left out: {len(heldout) + 4}, all listed in" in before, printed
    assert f"1  smaller than 8x8 pixels (height x width) ({good[1]})" in before
    assert f"1  empty caption ({good[2]})" in before
    assert "1  a .psd file, which is not read (13.psd)" in before
    assert f"left out: 1 more, all listed in {settings.run}/unet1-skipped.jsonl" in after
    assert "left out" not in err and "skipped" not in err
    named = (settings.run / "unet1-skipped.jsonl").read_text().splitlines()
    assert len(named) == len(heldout) + 5
    why = "smaller than 8x8 pixels (height x width): 5x5"
    assert {"name": good[1], "reason": why} in map(json.loads, named)
    assert "note: with so few images held out, eval/heldout is not measured" in before
    assert len(support.metrics(settings.run)) == 4
    assert not support.metrics(settings.run, "eval/heldout")


@pytest.mark.slow
def test_damaged_shards_and_images_in_a_run_that_is_stopped(tmp_path):
    """One of twenty shards is cut off and 1 % of the images are damaged: more than an epoch is
    trained, what was lost is named, and a resumed run is still the uninterrupted one."""
    shards, rng = tmp_path / "shards", np.random.default_rng(0)
    shards.mkdir()
    for number in range(20):
        with tarfile.open(shards / f"{number:05}.tar", "w") as tar:
            for i in range(10):
                data, pixels = io.BytesIO(), rng.integers(0, 255, (12, 12, 3), np.uint8)
                Image.fromarray(pixels).save(data, "png")
                image = data.getvalue()
                if (number, i) in ((3, 4), (7, 0)):  # seen by decoding alone
                    image = image[:-40] + bytes(40)
                for kind, content in (("png", image), ("txt", b"a picture")):
                    member = tarfile.TarInfo(f"{i:04}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    cut = shards / "00011.tar"
    cut.write_bytes(cut.read_bytes()[: 6 * 2048 + 100])
    more = dict(data=(str(shards),), limit=None, heldout_fraction=0.0, batch_size=32, save_every=4)
    runs = [support.settings(tmp_path, **more, steps=8, workdir=tmp_path / name) for name in "ab"]
    assert loop.run(runs[0], 1)
    assert loop.run(dataclasses.replace(runs[1], steps=4), 1)
    assert loop.run(dataclasses.replace(runs[1], resume=True), 1)
    for item in ("params", "ema", "opt_state"):
        support.assert_equal(*(support.saved(run.run, 8, item) for run in runs))
    for run in runs:
        lines = (run.run / "unet1-skipped.jsonl").read_text().splitlines()
        lost = {line["name"]: line["reason"] for line in map(json.loads, lines)}
        damaged, images = (
            {name for name in lost if name.endswith(".tar") == is_shard}
            for is_shard in (True, False)
        )
        assert damaged == {str(cut)} and "cut off" in lost[str(cut)]
        assert images == {"00003/0004", "00007/0000"} and "corrupt" in lost["00003/0004"]


def test_a_run_goes_on_with_the_same_pictures_elsewhere(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("red")
    settings = support.settings(tmp_path, data=(str(folder),), heldout_fraction=0.0, steps=1)
    assert loop.run(settings, 1)
    on = dataclasses.replace(settings, resume=True)
    assert loop.run(dataclasses.replace(on, steps=2, data=(f"{folder}/",)), 1)
    folder.rename(tmp_path / "moved")
    moved = dataclasses.replace(on, steps=3, data=(str(tmp_path / "moved"),))
    assert loop.run(moved, 1)
    Image.new("RGB", (8, 8), (0, 0, 9)).save(tmp_path / "moved" / "2.png")
    with pytest.raises(ValueError, match="--data .*moved, .*: not the pictures that the run was"):
        loop.run(dataclasses.replace(moved, steps=4), 1)


def test_a_set_that_is_all_held_out_names_the_flag(tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "dog_52.png")
    settings = support.settings(tmp_path, data=(str(tmp_path / "one"),))
    with pytest.raises(ValueError, match=r"\(1 of 1\) are held out .*--heldout-fraction 0 trains"):
        loop.run(settings, 1)


def test_stored_embeddings_of_another_width(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        np.save(tmp_path / f"{i}.npy", np.ones((2, 5), np.float32))
    with pytest.raises(ValueError, match="text_embeds are 5 wide, but text_embed_dim is 128"):
        loop.run(support.settings(tmp_path, data=(str(tmp_path),), heldout_fraction=0.0), 1)


def test_training_without_captions(tmp_path):
    settings = support.settings(tmp_path, no_captions=True, steps=1, sample_every=1, sample_steps=2)
    assert loop.run(settings, 1)
    assert not run_config.read(settings.run).condition_on_text
    assert (settings.run / "samples" / "unet1-0000001.png").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    settings = support.settings(tmp_path, steps=6, lr=1e30, max_grad_norm=None, save_every=1)
    with pytest.raises(ValueError, match=r"(loss|gradients) is (nan|inf) at step [2-6]\. ") as said:
        loop.run(settings, 1)
    bad = int(str(said.value).split("at step ")[1][0])
    assert checkpoint.latest_step(settings.run, 1) == bad - 1
    assert support.finite(support.saved(settings.run, bad - 1))


def test_samples_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    """The step itself is saved before they are drawn."""
    nan = np.full((8, 8, 8, 3), np.nan, np.float32)
    monkeypatch.setattr(Previews, "_sample", lambda *_: nan)
    settings = support.settings(tmp_path, steps=1, sample_every=1)
    with pytest.raises(UserError, match="samples of U-Net 1 at step 1 hold NaN or infinity"):
        loop.run(settings, 1)
    assert checkpoint.latest_step(settings.run, 1) == 1
    assert not (settings.run / "samples" / "unet1-0000001.png").exists()


@pytest.mark.slow
def test_language_is_judged_during_training(tmp_path, monkeypatch):
    """True images in place of samples: all of each kind of caption is right."""
    asked = []

    def true_images(previews, params, count, given, progress):
        asked.append(given.text_embeds)
        chosen = scenes.examples(scenes.KINDS[len(asked) - 1], count)
        return np.stack([scene.draw(32) for scene in chosen]).astype(np.float32) / 255

    monkeypatch.setattr(Previews, "_sample", true_images)
    cascade = dataclasses.replace(support.CASCADE, image_sizes=(32, 64))
    (tmp_path / "larger.json").write_text(json.dumps(cascade.to_dict()))
    settings = support.settings(
        tmp_path, data=("scenes",), steps=1, compose_every=1, compose_images=6
    )
    assert loop.run(dataclasses.replace(settings, config=tmp_path / "larger.json"), 1)
    [line] = support.metrics(settings.run, "eval/composition")
    assert len(asked) == 4 and not np.array_equal(asked[0], asked[1])
    assert {line[f"{kind}[right]"] for kind in scenes.KINDS} == {1.0}
    assert line["combinations[relation]"] == line["combinations[above]"] == 1
    assert not {"pairs[relation]", "combinations[inside]"} & set(line)  # none of the first six
    with pytest.raises(UserError, match="--compose-every needs a cascade with captions"):
        loop.run(dataclasses.replace(settings, no_captions=True, workdir=tmp_path / "other"), 1)


def test_the_first_bad_step_is_named(straight):
    """Also where the loss is fine and its gradient is not: the next checkpoint would hold NaN."""
    fine = dict(loss=jax.numpy.float32(1), grad_norm=jax.numpy.float32(2))
    for name, what in (("loss", "the loss"), ("grad_norm", "the norm of the gradients")):
        window = Window(straight)
        window.add(7, fine)
        window.add(8, fine | {name: jax.numpy.float32("nan")})
        window.add(9, dict.fromkeys(fine, jax.numpy.float32("nan")))
        with window.pause():
            pass
        with pytest.raises(ValueError, match=f"{what} is nan at step 8"):
            window.fetch()


def test_a_failing_write_leaves_the_last_checkpoint(straight, tmp_path, monkeypatch):
    settings = support.settings(tmp_path, steps=2)
    loop.run(settings, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    def ours(*_):
        raise TypeError("a fault of this library")

    on = dataclasses.replace(settings, steps=4, resume=True)
    message = "could not save step 4.*No space left.*Step 2 is complete"
    for save, kind, said in ((full, UserError, message), (ours, TypeError, "a fault of this")):
        monkeypatch.setattr(checkpoint.Writer, "save", save)
        with pytest.raises(kind, match=said):
            loop.run(on, 1)
    monkeypatch.undo()
    # The steps after the checkpoint are in metrics.jsonl twice, with the same numbers.
    assert loop.run(on, 1)
    support.assert_equal(support.saved(settings.run, 4), support.saved(straight.run, 4))


def test_speed_and_profile(tmp_path, monkeypatch, capsys):
    """Of a device whose peak is known; the trace begins when what compiles has compiled."""
    monkeypatch.setattr(flops, "peak", lambda *_: 1e12)
    settings = support.settings(tmp_path, steps=5, profile=1)
    loop.run(settings, 1)
    lines = support.metrics(settings.run)
    work = step_flops(support.CASCADE.stage(1), settings)
    for line in lines:
        assert line["images_per_second"] == pytest.approx(4 * line["steps_per_second"])
        used = line["steps_per_second"] * work / 1e12
        assert line["model_flop_utilization"] == pytest.approx(used)
        assert 0 <= line["waited_for_data"] <= 1
    assert list(Path(settings.run / "profile").rglob("*.xplane.pb"))
    assert "profile of steps 4 .. 4 in" in capsys.readouterr().out


def test_work_of_a_step_is_that_of_the_network_once(tmp_path):
    settings = support.settings(tmp_path)
    work = step_flops(support.CASCADE.stage(1), settings)
    for change in (dict(remat="nothing_saveable"), dict(accumulate=2)):
        assert step_flops(support.CASCADE.stage(1), dataclasses.replace(settings, **change)) == work
    twice = dataclasses.replace(settings, batch_size=8)
    assert step_flops(support.CASCADE.stage(1), twice) == 2 * work


def test_a_torn_line_is_passed_over(tmp_path):
    """Left as it is: a line that another stage is writing now may look the same."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n{"kind": "tr')
    for step in (2, 3):
        with Metrics(tmp_path, 1, settings={}) as metrics:
            metrics.write(step, "train", {"loss": 1.0})
    assert [line.get("step") for line in support.metrics(tmp_path)] == [None, 2, 3]


def test_tensorboard_gets_the_metrics(tmp_path, monkeypatch):
    settings = support.settings(tmp_path, steps=1, tensorboard=True)
    loop.run(settings, 1)
    assert list((settings.run / "tensorboard").glob("events*"))

    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match="--tensorboard needs tensorboardX: pip install"):
        Metrics(tmp_path, 1, tensorboard=True, settings={})
    with pytest.raises(ValueError, match="--wandb needs wandb: pip install"):
        Metrics(tmp_path, 1, wandb="project", settings={})


@pytest.mark.slow
def test_another_run_goes_on_with_more_pictures_and_a_larger_batch(tmp_path, capsys):
    """From the optimiser's state and the step; resumed exactly as any other."""
    first = support.settings(tmp_path, steps=2)
    assert loop.run(first, 1)
    again = dict(continue_from=Path(first.run), batch_size=8, limit=16, lr=2e-4, steps=4)
    settings = support.settings(tmp_path, workdir=tmp_path / "more", **again)
    capsys.readouterr()
    assert loop.run(settings, 1)
    said = capsys.readouterr().out
    assert f"continuing from step 2 of {first.run}/unet1" in said
    for line in ("--batch-size was 4 and is 8", "--lr was 0.0001 and is 0.0002",
                 "--limit was 8 and is 16", "the number of pictures was 8 and is 16"):  # fmt: skip
        assert f"changed: {line}" in said, said
    assert [line["step"] for line in support.metrics(settings.run)] == [3, 4]
    count = support.saved(settings.run, 4, "opt_state")
    before = support.saved(first.run, 2, "opt_state")
    steps = [int(x) for x in jax.tree.leaves(count) if np.ndim(x) == 0]
    assert steps and steps == [int(x) + 2 for x in jax.tree.leaves(before) if np.ndim(x) == 0]
    with pytest.raises(UserError, match="is at step 2: --steps 2 leaves none to take"):
        loop.run(dataclasses.replace(settings, workdir=tmp_path / "none", steps=2), 1)
    assert not (tmp_path / "none" / "unet1").exists()
    cascade = dataclasses.replace(support.CASCADE, pred_objectives="noise")
    (tmp_path / "noise.json").write_text(json.dumps(cascade.to_dict()))
    other = dict(config=tmp_path / "noise.json", workdir=tmp_path / "n", steps=2)
    with pytest.raises(UserError, match="leaves none"):
        loop.run(dataclasses.replace(settings, **other), 1)
    assert "changed: pred_objectives was v and is noise" in capsys.readouterr().out
    with pytest.raises(UserError, match="--optimizer was adam and is adafactor: that would not"):
        loop.run(dataclasses.replace(settings, workdir=tmp_path / "o", optimizer="adafactor"), 1)
    with pytest.raises(UserError, match="give only one of them"):
        dataclasses.replace(settings, init_from=Path(first.run))
