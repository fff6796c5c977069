"""What the page does, without a browser: requests, the queue, previews, results, messages."""

import dataclasses
import logging
import queue
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.presets import PRESETS
from sample import asking, serving
from sample.asking import Ask
from sample.serving import Cancelled, Line, Served
from sample.settings import Settings
from tests.sample.conftest import pixels, recorded

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def drawing(run):
    given = Settings(checkpoint=run, steps=(3, 2), cond_scale=(2.0, 1.0), batch_size=2)
    return Served.open("serve", given)


def ask(**given) -> Ask:
    return Ask(**dict(prompt="x", steps=(3, 2), sampler="dpm++2m", cond_scale=2.0) | given)


def drawn(drawing, folder: Path, line: Line | None = None, **given) -> list[serving.Update]:
    return list(serving.draw(drawing, line or Line(), ask(**given), folder, "tab"))


def image_file(folder: Path, height: int, width: int) -> Path:
    path = folder / "sent.png"
    Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def test_a_request_becomes_files_with_recipes(drawing, tmp_path):
    updates = drawn(drawing, tmp_path, count=3, seed=5, negative_prompt="y")
    assert any(update.preview for update in updates)
    assert updates[-1].over and updates[-1].written == 3
    assert updates[-1].status.startswith("Done.") and "demo encoder" in updates[-1].status
    paths = serving.results(tmp_path)
    assert len(paths) == 3 and (tmp_path / "x-5.png") in paths
    recipe = recorded(tmp_path / "x-5.png")
    assert (recipe["command"], recipe["negative_prompt"]) == ("text_to_image", "y")
    assert recipe["cond_scale"] == [2, 1] and recipe["timesteps"] == [3, 2]


def test_what_can_be_changed_compiles_nothing(drawing, tmp_path):
    """Guidance down to 1, steps, seed, prompt and count within the padded batch."""
    names = []

    class Compiled(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Finished XLA compilation" in record.getMessage():
                names.append(record.getMessage())

    drawn(drawing, tmp_path, count=2)
    handler = Compiled(logging.DEBUG)
    jax.config.update("jax_log_compiles", True)
    logging.getLogger("jax").addHandler(handler)
    try:
        drawn(drawing, tmp_path, count=2, cond_scale=9.5, seed=3)
        drawn(drawing, tmp_path, count=2, cond_scale=1.0, steps=(5, 4), prompt="y z")
        assert names == []
        assert drawn(drawing, tmp_path, count=2, sampler="ddim")[-1].written == 2
        assert len(names) > 0, "another sampler is another program: the test would see one"
    finally:
        logging.getLogger("jax").removeHandler(handler)
        jax.config.update("jax_log_compiles", False)


def test_from_an_image(drawing, tmp_path):
    """Upscaling starts at the second U-Net; variations depend on the strength; both on the image"""
    image = asking.read_image(image_file(tmp_path, 40, 30), 3)
    out = tmp_path / "out"
    for task in ("upscale", "image_to_image"):
        (last,) = [u for u in drawn(drawing, out, task=task, image=image) if u.over]
        assert last.status.startswith("Done."), last
        (newest, *_) = serving.results(out)
        size = (80, 60, 3) if task == "upscale" else (16, 16, 3)
        assert pixels(newest).shape == size and recorded(newest)["command"] == task
        drawn(drawing, out, task=task, image=255 - image)
        assert np.abs(pixels(serving.results(out)[0]) - pixels(newest)).mean() > 5
    assert recorded(newest)["strength"] == 0.6


def test_upscaling_by_a_stage_in_the_middle_stops_there():
    image = RANDOM.integers(0, 256, (20, 20, 3), np.uint8)
    for stage in (2, 3):
        given = asking.inputs(ask(task="upscale", image=image, stage=stage), PRESETS["scenes"](), 3)
        assert given.options["stop_at_unet_number"] == given.first == stage


def test_inpainting_keeps_the_rest_to_the_bit(drawing, tmp_path):
    """The way through the editor: enlarged, painted on, reduced again."""
    image = asking.read_image(image_file(tmp_path, 16, 16), 3)
    large = asking.enlarged(Image.fromarray(image))
    assert large.size == (512, 512)
    np.testing.assert_array_equal(np.asarray(asking.reduced(large)), image)
    layer = Image.new("RGBA", large.size)
    layer.paste((255, 0, 0, 255), (64, 64, 256, 224))
    layer.paste((255, 0, 0, 255), (300, 300, 305, 305))  # less than half of a pixel
    mask = asking.painted([layer], (16, 16))
    wanted = np.zeros((16, 16), bool)
    wanted[2:7, 2:8] = True
    np.testing.assert_array_equal(mask, wanted)
    drawn(drawing, tmp_path / "out", task="inpaint", image=image, mask=mask)
    (path,) = serving.results(tmp_path / "out")
    np.testing.assert_array_equal(pixels(path)[~mask], image[~mask])
    assert np.abs(pixels(path) - image)[mask].mean() > 20
    noise = Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), np.uint8))
    assert asking.reduced(noise) is noise


def test_one_at_a_time_in_order_and_cancelled(drawing, tmp_path):
    line = Line(most=2)
    other = line.join("other")
    first = serving.draw(drawing, line, ask(), tmp_path, "a")
    second = serving.draw(drawing, line, ask(), tmp_path, "b")
    assert next(first).status == "In the queue: 1 ahead of you."
    assert next(second).status == "In the queue: 2 ahead of you."
    assert "2 others are waiting" in drawn(drawing, tmp_path, line)[-1].status
    assert line.cancel("a") == 1 and line.cancel("nobody") == 0
    assert next(first).status == "Stopped; 0 of 1 images were finished."
    assert next(second).status == "In the queue: 1 ahead of you."
    line.leave(other)
    assert [*second][-1].status.startswith("Done.")
    assert line.place(line.join("c")) == 0, "the device is free again"


def test_stopping_and_leaving_end_the_drawing(drawing, tmp_path):
    """Pressed in the middle, or the page is closed; then the next one gets its turn."""
    line = Line()
    many = ask(count=16, steps=(200, 200))
    updates = serving.draw(drawing, line, many, tmp_path, "a")
    while "step" not in next(updates).status:
        pass
    line.cancel("a")
    assert [*updates][-1].status.startswith("Stopped;")
    updates = serving.draw(drawing, line, many, tmp_path, "b")
    while "step" not in next(updates).status:
        pass
    updates.close()
    assert drawn(drawing, tmp_path, line)[-1].status.startswith("Done.")
    assert len(serving.results(tmp_path)) < 16


def test_listener_shows_few_and_stops():
    events, ticket = queue.Queue(), serving.Ticket("a")
    on_step = serving.listener(ticket, events, 1)
    estimates = np.full((2, 8, 8, 3), 0.5, np.float32)
    for step in range(1, 4):
        on_step(1, step, 3, estimates)
    shown = [events.get().preview for _ in range(3)]
    assert shown[0] and shown[2] and shown[1] is None, "the first, the last, none in between"
    assert shown[0].size == (256, 256), "one of the two rows is padding"
    ticket.cancelled.set()
    with pytest.raises(Cancelled):
        on_step(2, 1, 3, estimates)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prompt=" \n "), "the prompt is empty"),
        (dict(count=17), "number of images must be from 1 to 16, not 17"),
        (dict(count=0), "number of images must be from 1 to 16, not 0"),
        (dict(cond_scale=50.0), "guidance must be from 1 to 20"),
        (dict(seed=-1), "seed must be from 0 to"),
        (dict(steps=(3, 251)), "Steps must be from 1 to 250"),
        (dict(sampler="none"), "sampler must be one of ancestral"),
        (dict(task="upscale"), "Choose an image first"),
        (
            dict(task="upscale", image=np.zeros((1025, 1024, 3), np.uint8)),
            "The image has 1,049,600 pixels; at most 1,048,576 are upscaled",
        ),
        (
            dict(task="inpaint", image=np.zeros((8, 8, 3), np.uint8), mask=np.zeros((8, 8), bool)),
            "the mask is empty",
        ),
    ],
)
def test_a_mistake_is_one_line(drawing, tmp_path, given, message):
    (update,) = drawn(drawing, tmp_path / "out", **given)
    assert update.over and message in update.status and "\n" not in update.status
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_is_cut_and_said(drawing, tmp_path):
    last = drawn(drawing, tmp_path, prompt="red apple " * 1000)[-1]
    assert "10,000" not in last.status and "has 9,999 characters" in last.status
    assert "only the first 2,000 are read" in last.status and "is cut off: it has" in last.status


def test_no_path_reaches_the_page(drawing, tmp_path, monkeypatch, capsys):
    home = str(tmp_path)
    for error, shown in (
        (UserError(f"{home}/runs/demo is damaged: {home}/a.png"), "demo is damaged: a.png"),
        (OSError(28, "No space left on device", f"{home}/x.png"), "No space left on device"),
        (RuntimeError(f"in {home}"), "Something went wrong"),
    ):
        monkeypatch.setattr(
            Served, "draw", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
        )
        (*_, last) = drawn(drawing, tmp_path)
        assert shown in last.status and home not in last.status and "/runs" not in last.status
    assert home in capsys.readouterr().err, "the server's log has the bug"
    assert serving.without_paths("and/or 1/2, gs://b/c/d.png") == "and/or 1/2, d.png"


def test_sessions_and_results(tmp_path):
    session = serving.new_session()
    folder = serving.session_folder(tmp_path, session)
    assert folder == tmp_path / session and serving.results(folder) == []
    for name in (None, "", "../../etc", session + "/..", "A" * 16):
        with pytest.raises(UserError, match="no session"):
            serving.session_folder(tmp_path, name)
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "notes.txt").write_text("x")
    (tmp_path / "secret.png").write_bytes(b"x")
    assert serving.result(folder, "a.png") == folder / "a.png"
    for name in ("b.png", "../secret.png", "notes.txt"):
        with pytest.raises(UserError, match="no longer exists"):
            serving.result(folder, name)


def test_files_that_are_no_images(tmp_path, monkeypatch):
    bad = tmp_path / "bad.png"
    for content in (b"", b"not an image", image_file(tmp_path, 9, 9).read_bytes()[:40]):
        bad.write_bytes(content)
        with pytest.raises(UserError) as caught:
            asking.read_image(bad, 3)
        assert str(tmp_path) not in str(caught.value)
    monkeypatch.setattr(asking, "MOST_PIXELS", 80)
    with pytest.raises(UserError, match="at most 80 pixels"):
        asking.read_image(image_file(tmp_path, 9, 9), 3)


def test_the_page_needs_a_local_folder(drawing):
    given = dataclasses.replace(drawing.given, out=Path("gs://bucket/out"))
    with pytest.raises(UserError, match="--out: the page can only show files in a local folder"):
        serving.local_root(dataclasses.replace(drawing, given=given))


def test_threads_draw_one_after_the_other():
    """Whoever comes next waits until the one before has left."""
    line, order = Line(), []
    tickets = [line.join(str(i)) for i in range(3)]

    def work(i: int) -> None:
        while line.place(tickets[i], wait=5.0):
            pass
        order.append(i)
        line.leave(tickets[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2]
