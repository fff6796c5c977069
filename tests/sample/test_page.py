"""The page of `python -m sample.serve` in a headless Chromium, on a tiny cascade."""

import logging
import re
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from sample import asking, serve, serving
from tests.conftest import browser as find_browser
from tests.sample.conftest import pixels

pytestmark = [
    pytest.mark.page,
    pytest.mark.slow,
    # gradio's own, and those of what it stands on
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-angle=swiftshader"
).split()
PATIENCE = 25_000  # milliseconds
LONG = "250"
"""Steps of a drawing that is still going on when the next thing is tried."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def url(run, out):
    """A server in this process, so that the programs it compiles can be counted."""
    given = serve.Settings(
        checkpoint=run, out=out, steps=(3, 2), cond_scale=(2.0, 1.0), batch_size=1
    )
    page = serve.launch(given, serve.open_drawing(given), block=False)
    assert page.allowed_paths == [str(out)]  # the folder for temporary files is allowed anyhow
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visitor(chromium):
    """A browser's memory of its own; its tabs share it."""
    context = chromium.new_context(viewport=dict(width=1280, height=1100))
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def slow(monkeypatch):
    """A device that takes 0.2 seconds a step: what happens meanwhile can be seen."""
    listener = serving.listener

    def slower(*arguments, **options):
        on_step = listener(*arguments, **options)

        def wait(*step):
            on_step(*step)
            time.sleep(0.2)

        return wait

    monkeypatch.setattr(serving, "listener", slower)


def open_tab(visitor, url):
    tab = visitor.new_page()
    tab.goto(url)
    tab.get_by_label("Prompt", exact=True).wait_for()
    tab.wait_for_function("localStorage.getItem('imagen-jax') !== null")
    return tab


def ask(tab, prompt: str | None = None, task: str = "text_to_image", **numbers) -> None:
    """Fills in the page and presses the task's button."""
    if prompt is not None:
        tab.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in numbers.items():
        set_number(tab, name, str(value))
    tab.locator(f"#run_{task}").click()


def set_number(tab, name: str, value: str) -> None:
    field = tab.locator(f"#{name} input[type=number]")
    field.fill(value)
    field.blur()


def status(tab, pattern: str) -> str:
    """Waits until the status line says so."""
    found = tab.locator("#status", has_text=re.compile(pattern))
    found.wait_for(timeout=PATIENCE)
    return found.inner_text()


def shown(tab, count: int) -> None:
    """Waits until the gallery has so many images."""
    tab.wait_for_function(
        "n => document.querySelectorAll('#gallery .grid-container img').length == n", arg=count
    )


def files(out: Path) -> list[Path]:
    return sorted(out.rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)


def send(tab, task: str) -> None:
    """Clicks the newest result, and the button that sends it to a task."""
    tab.locator("#gallery img").first.click()
    tab.wait_for_timeout(500)  # the choice is told the server
    tab.locator(f"#send_{task}").click()
    tab.locator(f"#run_{task}").wait_for()


def test_a_prompt_becomes_images_that_survive_a_reload(slow, visitor, url, out):
    tab = open_tab(visitor, url)
    ask(tab, "red apple", count=2)
    tab.locator("#preview img").wait_for(state="attached")
    said = status(tab, "Done")
    assert "demo encoder" in said
    shown(tab, 2)
    names = {path.name for path in files(out)}
    assert "red-apple-0.png" in names and len(names) == 2
    tab.reload()
    shown(tab, 2)
    assert tab.locator("#preview img").count() == 0


def test_another_visitor_does_not_see_them(visitor, url, out):
    tab = open_tab(visitor, url)
    assert files(out) and tab.locator("#gallery img").count() == 0


def test_guidance_compiles_nothing(visitor, url):
    tab = open_tab(visitor, url)
    ask(tab, "pear")
    status(tab, "Done")
    names = []

    class Compiled(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Finished XLA compilation" in record.getMessage():
                names.append(record.getMessage())

    handler = Compiled(logging.DEBUG)
    jax.config.update("jax_log_compiles", True)
    logging.getLogger("jax").addHandler(handler)
    try:
        slider = tab.locator("#cond_scale input[type=range]")
        slider.focus()
        for _ in range(30):
            slider.press("ArrowRight")
        assert tab.locator("#cond_scale input[type=number]").input_value() == "5"
        ask(tab)
        shown(tab, 2)
        ask(tab, cond_scale=1)
        shown(tab, 3)
    finally:
        logging.getLogger("jax").removeHandler(handler)
        jax.config.update("jax_log_compiles", False)
    assert names == []


def test_stop(slow, visitor, url, out):
    before = len(files(out))
    tab = open_tab(visitor, url)
    ask(tab, "pear", count=16, steps1=LONG, steps2=LONG)
    status(tab, "step")
    tab.locator("#stop").click()
    said = status(tab, "Stopped")
    assert re.search(r"Stopped; \d+ of 16 images were finished", said)
    assert len(files(out)) < before + 16
    tab.locator("#stop").click()
    status(tab, "nothing to stop")


def test_two_tabs_at_once(slow, visitor, url):
    """The second waits, is told its place, and gets its turn; both galleries have all."""
    first, second = open_tab(visitor, url), open_tab(visitor, url)
    ask(first, "pear", count=16, steps1=LONG, steps2=LONG)
    status(first, "step")
    ask(second, "red apple")
    status(second, "In the queue: 1 ahead of you")
    first.locator("#stop").click()
    status(first, "Stopped")
    status(second, "Done")
    second.reload()
    second.locator("#gallery img").first.wait_for()
    assert second.locator("#gallery img").count() >= 1


def test_a_closed_tab_makes_room(slow, visitor, url):
    first, second = open_tab(visitor, url), open_tab(visitor, url)
    ask(first, "pear", count=16, steps1=LONG, steps2=LONG)
    status(first, "step")
    ask(second, "red apple")
    status(second, "In the queue: 1 ahead of you")
    first.close()
    status(second, "Done")


def test_a_result_is_upscaled_and_varied(visitor, url, out):
    tab = open_tab(visitor, url)
    ask(tab, "red apple")
    shown(tab, 1)
    for count, (task, size) in enumerate((("upscale", 32), ("image_to_image", 16)), 2):
        send(tab, task)
        tab.locator(f"#image_{task} img").wait_for()
        ask(tab, task=task)
        status(tab, "Done")
        tab.wait_for_timeout(500)
        assert asking.read_image(files(out)[-1], 3).shape == (size, size, 3)
        assert len(files(files(out)[-1].parent)) == count
        shown(tab, count)  # not the chosen one at large, which has moved
        tab.locator("#send_inpaint").click()
        status(tab, "Click one of your images first")


def test_a_result_is_inpainted_where_it_was_painted(visitor, url, out):
    tab = open_tab(visitor, url)
    ask(tab, "red apple")
    shown(tab, 1)
    before = pixels(files(out)[-1])
    send(tab, "inpaint")
    tab.locator("#run_inpaint").click()
    status(tab, "the mask is empty")
    paint(tab)
    tab.locator("#run_inpaint").click()
    status(tab, "Done")
    after = pixels(files(out)[-1])
    changed = np.abs(after - before).max(axis=-1) > 0
    assert after.shape == before.shape and 4 < changed.sum() < 128, changed.sum()
    rows, columns = np.nonzero(changed)
    assert rows.min() >= 4 and rows.max() < 12 and columns.min() >= 3 and columns.max() < 13


def paint(tab) -> None:
    """A stroke through the middle of the editor's image."""
    canvas = tab.locator("#editor canvas").first
    canvas.scroll_into_view_if_needed()
    tab.wait_for_timeout(1000)  # the image slides in
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2
    x = box["x"] + box["width"] / 2
    tab.mouse.move(x - 40, middle)
    tab.mouse.down()
    tab.mouse.move(x + 40, middle, steps=10)
    tab.mouse.up()
    tab.wait_for_timeout(500)


def test_a_prompt_of_10_000_characters(visitor, url):
    tab = open_tab(visitor, url)
    ask(tab, "x" * 10_000)
    said = status(tab, "Done")
    assert "The prompt has 10,000 characters; only the first 2,000 are read." in said


def test_mistakes_are_shown_without_paths(visitor, url, run, tmp_path):
    tab = open_tab(visitor, url)
    ask(tab, "  ")
    status(tab, "the prompt is empty")
    tab.locator("#send_upscale").click()
    status(tab, "Click one of your images first")
    (tmp_path / "empty.png").write_bytes(b"")
    tab.get_by_role("tab", name="Upscale").click()
    tab.locator("#image_upscale input[type=file]").set_input_files(tmp_path / "empty.png")
    tab.wait_for_timeout(1000)
    ask(tab, "x", task="upscale")
    tab.wait_for_timeout(1500)
    text = tab.locator("body").inner_text()
    assert "Traceback" not in text and str(run.parent) not in text and "/tmp" not in text
