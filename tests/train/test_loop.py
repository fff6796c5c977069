"""Training as a user runs it: resume, signals, bad data, full disks, and that it learns."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import imagen_jax
from imagen_jax import checkpoint, commands, nn
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.data import decode, open_source
from tests.train import support
from train import base, loop, super_res
from train.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps without a stop."""
    settings = support.settings(tmp_path_factory.mktemp("straight"), sample_every=4, sample_steps=2)
    assert loop.run(settings, 1)
    return settings


def test_a_resumed_run_is_the_uninterrupted_one(straight, tmp_path):
    first = support.settings(tmp_path, steps=2)
    assert loop.run(first, 1)
    assert loop.run(dataclasses.replace(first, steps=4, resume=True), 1)
    for item in ("params", "ema"):
        support.assert_equal(
            support.saved(first.run, 4, item), support.saved(straight.run, 4, item)
        )
    keys = ("step", "loss", "grad_norm", "learning_rate")
    rows = [
        [[line[key] for key in keys] for line in support.metrics(run)]
        for run in (first.run, straight.run)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_what_a_run_leaves(straight):
    assert checkpoint.read_config(straight.run) == support.CASCADE
    recorded = json.loads((straight.run / "config.json").read_text())["training"]["unet1"]
    assert recorded["steps"] == 4 and recorded["data"] == "bundled"
    evaluations = support.metrics(straight.run, "eval/heldout")
    assert [line["step"] for line in evaluations] == [0, 4]
    assert evaluations[-1]["loss[0..2.5]"] > 0
    with Image.open(straight.run / "samples" / "unet1-0000004.png") as picture:
        assert picture.width > 300
    assert support.metrics(straight.run)[-1]["images_per_second"] > 0


def test_load_gives_the_average_or_the_online_weights(straight):
    for weights, item in (("ema", "ema"), ("online", "params")):
        unet = imagen_jax.load(straight.run, weights=weights).unets[0]
        params = nn.unet.nnx.to_pure_dict(nn.unet.nnx.split(unet)[1])
        support.assert_equal(params, support.saved(straight.run, 4, item))


def test_an_untrained_stage_cannot_be_sampled(straight):
    imagen = imagen_jax.load(straight.run)
    text = np.ones((1, 3, 128), np.float32)
    with pytest.raises(ValueError, match="U-Net 2 has no weights"):
        imagen.sample(text_embeds=text, timesteps=1, key=jax.random.key(0))


def test_mistakes(straight, tmp_path):
    again = dataclasses.replace(straight, steps=6)
    mistakes = {
        "is at step 4: continue with --resume": again,
        "--seed was 0 and is 1": dataclasses.replace(again, resume=True, seed=1),
        "--batch-size was 4 and is 8": dataclasses.replace(again, resume=True, batch_size=8),
        "describes another cascade: unets.0.dim is 8 there, 16 here": dataclasses.replace(
            again, config=other_cascade(tmp_path), resume=True
        ),
        "no source 'nowhere'": support.settings(tmp_path, data="nowhere"),
        "no policy of jax.checkpoint_policies": support.settings(tmp_path, remat="all"),
    }
    for message, settings in mistakes.items():
        with pytest.raises(ValueError, match=message):
            loop.run(settings, 1)
    with pytest.raises(ValueError, match="--batch-size 4 does not split into --accumulate 3"):
        support.settings(tmp_path, accumulate=3)
    with pytest.raises(ValueError, match="unet_number = 3 is none of 1 .. 2"):
        loop.run(support.settings(tmp_path), 3)
    assert checkpoint.latest_step(straight.run, 1) == 4


def other_cascade(folder: Path) -> Path:
    data = support.CASCADE.to_dict()
    for unet in data["unets"]:
        unet["dim"] = 16
    (folder / "other.json").write_text(json.dumps(data))
    return folder / "other.json"


def test_weights_alone_can_be_taken_over(straight, tmp_path):
    settings = support.settings(tmp_path, init_from=straight.run, steps=1, lr=1e-12)
    loop.run(settings, 1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9),
        support.saved(settings.run, 1),
        support.saved(straight.run, 4, "ema"),
    )
    other = support.settings(tmp_path, config=other_cascade(tmp_path), init_from=straight.run)
    with pytest.raises(ValueError, match="unets.0.dim is 8 there, 16 here"):
        loop.run(dataclasses.replace(other, workdir=tmp_path / "other"), 1)


def test_a_damaged_checkpoint_is_one_line(straight, tmp_path):
    settings = support.settings(tmp_path, steps=2)
    loop.run(settings, 1)
    for file in (settings.run / "unet1" / "2" / "ema").rglob("*"):
        if file.is_file() and "metadata" not in file.name.lower():
            file.write_bytes(file.read_bytes()[:10])
    # In a process of its own: threads of Orbax that still read complain after the failure.
    command = [sys.executable, "-m", "sample.text_to_image", "--prompt", "pear"]
    command += ["--checkpoint", str(settings.run), "--stop-at-unet-number", "base"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: " in done.stderr and "is no checkpoint of this architecture" in done.stderr


def test_no_captions_and_bad_pictures(tmp_path, capsys):
    """A corrupt picture and a small one among good ones: named, counted, never fatal."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:40])
    Image.new("RGB", (5, 5)).save(folder / "small.png")
    settings = support.settings(
        tmp_path, data=str(folder), no_captions=True, limit=None, heldout_fraction=0.0
    )
    assert loop.run(settings, 1)
    printed = capsys.readouterr()
    assert "broken" in printed.out + printed.err and "small" in printed.out + printed.err
    assert "skipped 2 of 8 pictures" in printed.out
    assert not checkpoint.read_config(settings.run).condition_on_text


def test_a_loss_that_is_not_finite_stops_the_run(straight, tmp_path):
    settings = support.settings(tmp_path, steps=6, lr=1e30, max_grad_norm=None)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step [2-6]"):
        loop.run(settings, 1)


def test_a_failing_disk_leaves_the_last_checkpoint(straight, tmp_path, monkeypatch):
    settings = support.settings(tmp_path, steps=2)
    loop.run(settings, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_step", full)
    with pytest.raises(ValueError, match="could not save step 4.*No space left.*Step 2 is whole"):
        loop.run(dataclasses.replace(settings, steps=4, resume=True), 1)
    monkeypatch.undo()
    assert loop.run(dataclasses.replace(settings, steps=4, resume=True), 1)
    support.assert_equal(support.saved(settings.run, 4), support.saved(straight.run, 4))


def test_tensorboard_gets_the_metrics(tmp_path):
    settings = support.settings(tmp_path, steps=1, tensorboard=True)
    loop.run(settings, 1)
    assert list((settings.run / "tensorboard").glob("events*"))


def run_main(monkeypatch, main, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    monkeypatch.setattr(commands, "use_compilation_cache", lambda: None)
    commands.run(main)


def test_the_commands(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, base.main, "--preset", "tiny", "--print-config")
    assert ImagenConfig.from_dict(json.loads(capsys.readouterr().out)).image_sizes == (8, 16)
    with pytest.raises(SystemExit, match="error: 'sr' is no stage: give its number"):
        run_main(monkeypatch, super_res.main, "--unet-number", "sr")
    with pytest.raises(SystemExit, match="error: U-Net 1 is the base"):
        run_main(monkeypatch, super_res.main, "--unet-number", "base")
    file = tmp_path / "mistaken.json"
    file.write_text(json.dumps(support.CASCADE.to_dict() | dict(image_size=8)))
    with pytest.raises(SystemExit, match="no field 'image_size'; did you mean 'image_sizes'?"):
        run_main(monkeypatch, base.main, "--config", file)
    with pytest.raises(SystemExit, match="No such file"):
        run_main(monkeypatch, base.main, "--config", tmp_path / "absent.json")
    settings = support.settings(tmp_path)
    arguments = ("--steps", 1, "--limit", 8, "--batch-size", 4, "--eval-batches", 1)
    run_main(
        monkeypatch, super_res.main, "--config", settings.config, "--unet-number", "sr256",
        "--workdir", settings.run, "--sample-steps", 2, *arguments,
    )  # fmt: skip
    assert checkpoint.latest_step(settings.run, 2) == 1


def test_ctrl_c_saves_and_says_how_to_go_on(straight, tmp_path):
    settings = support.settings(tmp_path, steps=100_000)
    command = [
        sys.executable, "-W", "error", "-m", "train.base", "--config", settings.config,
        "--workdir", settings.run, "--steps", "100000", "--limit", "8", "--batch-size", "4",
        "--eval-batches", "1", "--log-every", "1", "--sample-every", "0",
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip
    metrics = settings.run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    step = checkpoint.latest_step(settings.run, 1)
    assert step >= 1
    assert f"SIGINT: stopped after step {step}, saved in {settings.run}" in out
    assert "--resume" in out and "Traceback" not in err


def test_it_learns_eight_pictures(tmp_path):
    """Without guidance every caption's sample is nearest to its own picture of the eight."""
    network = UnetConfig(
        dim=16,
        dim_mults=(1, 2),
        attn_dim_head=8,
        attn_heads=2,
        max_text_len=16,
        layer_attns=False,
        layer_cross_attns=(False, True),
        attn_pool_num_latents=4,
        init_cross_embed_kernel_sizes=(3,),
        use_global_context_attn=False,
    )
    config = ImagenConfig(
        unets=network, image_sizes=8, text_encoder_name="demo", pred_objectives="v"
    )
    file = tmp_path / "learner.json"
    file.write_text(json.dumps(config.to_dict()))
    captions = ["red apple", "pear", "eggplant", "broccoli", "panda", "blue heart", "taxi", "crown"]
    listed = tmp_path / "captions.txt"
    listed.write_text("\n".join(captions))
    settings = Settings(
        config=file,
        workdir=tmp_path / "run",
        captions_from=listed,
        steps=600,
        batch_size=16,
        lr=3e-3,
        warmup_steps=20,
        cosine_decay_max_steps=600,
        ema="plain",
        ema_decay=0.98,
        log_every=100,
        eval_every=600,
        save_every=600,
        sample_every=0,
    )
    assert loop.run(settings, 1)
    drawn = imagen_jax.load(settings.run).sample(
        texts=captions, timesteps=50, key=jax.random.key(1)
    )
    source = open_source("bundled", split="train").with_captions(captions)
    real = np.stack([decode(record.image, image_size=8) for record in source]) / 255
    distances = np.square(np.asarray(drawn)[:, None] - real[None]).mean(axis=(2, 3, 4))
    assert distances.argmin(axis=1).tolist() == list(range(8)), distances.round(3)
    evaluations = support.metrics(settings.run, "eval/train")
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] / 5
