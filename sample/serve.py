"""Serves a page that draws images with a trained cascade.

    python -m sample.serve --checkpoint runs/demo               # http://127.0.0.1:7860
    python -m sample.serve --checkpoint RUN --port 8000 --num-images 4 --cond-scale 5 1
    python -m sample.serve --checkpoint RUN --host 0.0.0.0      # for everyone who can reach you

Draws from prompts, upscales, inpaints under a hand-painted mask, and starts from an image; one
click sends a result to another tab. One drawing runs at a time, others wait in a queue. The flags
set the page's initial values. Each visitor's images are saved in a separate folder under
samples/serve in the run directory, with their recipes inside. Needs the extra `ui`: pip install -e
'.[ui]'.
"""

import dataclasses
import html
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, no_type_check

import numpy as np

import commands
from imagen_jax.data.images import MODES
from imagen_jax.diffusion.samplers import SAMPLERS
from imagen_jax.errors import UserError, parse
from imagen_jax.pixels import to_pil
from imagen_jax.types import Size
from sample import asking, serving, settings
from sample.asking import MOST_GUIDANCE, MOST_IMAGES, MOST_STEPS, Ask
from sample.serving import Line, Served

try:
    import gradio as gr
except ImportError:  # the extra `ui` is not installed: `main` says so
    gr = None

UPLOAD = "20mb"
TABS = {"upscale": "Upscale", "inpaint": "Inpaint", "image_to_image": "Image to image"}
"""Tasks that start from an image."""
SEND = {"upscale": "Upscale it", "inpaint": "Inpaint it", "image_to_image": "Start from it"}
CSS = "#preview img { max-width: 100%; image-rendering: pixelated; } footer { display: none; }"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """Serves a page that draws images with a trained cascade."""

    host: str = "127.0.0.1"
    """Address to listen on. By default only this machine can connect; there is no password."""
    port: int | None = None
    """Port to listen on. Default: the first free port from 7860 on."""
    num_images: int = 1
    """Initial value of the page's number of images."""

    def __post_init__(self):
        super().__post_init__()
        if self.port is not None and not 1 <= self.port < 2**16:
            raise UserError(f"--port {self.port} must lie in 1 .. {2**16 - 1}.")

    @property
    def counts(self) -> tuple[str, ...]:
        return (*super().counts, "num_images")


def main() -> None:
    given = parse(Settings, prog="python -m sample.serve", description=__doc__)
    if gr is None:
        raise UserError("the page needs gradio: pip install -e '.[ui]'")
    launch(given, open_drawing(given))


def open_drawing(given: Settings) -> Served:
    """The cascade, with its weights and its text encoder loaded. Prints its notes."""
    drawing = Served.open("serve", given)
    for note in drawing.notes:
        print(note, flush=True)
    _ = drawing.pipeline.imagen
    if drawing.config.condition_on_text:
        _ = drawing.pipeline.encoder
    return drawing


def launch(given: Settings, drawing: Served, *, block: bool = True) -> "gr.Blocks":
    """Starts the server; with `block` until Ctrl-C. Raises UserError if it cannot listen."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="imagen-jax-")
    page = make_page(drawing, num_images=given.num_images)
    page.queue(default_concurrency_limit=None)  # the queue is `serving.Line`
    try:
        page.launch(
            server_name=given.host,
            server_port=given.port,
            max_file_size=UPLOAD,
            allowed_paths=[str(serving.local_root(drawing).resolve())],
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            css=CSS,
            ssr_mode=False,
        )
    except OSError as error:
        raise UserError(
            f"cannot listen on --host {given.host} --port {given.port}; another program may be "
            "using it. Without --port the page takes the first free one."
        ) from error
    print(f"the page is at {page.local_url} (Ctrl-C stops it)", flush=True)
    if block:
        page.block_thread()
    return page


def make_page(drawing: Served, *, num_images: int = 1) -> "gr.Blocks":
    """The page of a cascade. Raises UserError if its results are not on a local disk."""
    root, line = serving.local_root(drawing), Line()
    with gr.Blocks(title="imagen-jax", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        session = gr.BrowserState(None, storage_key="imagen-jax", secret="imagen-jax")
        gr.Markdown(f"# {html.escape(drawing.given.run.name)}")
        with gr.Row():
            with gr.Column():
                fields = {}
                if drawing.config.condition_on_text:
                    fields["prompt"] = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
                tabs, buttons, sources = task_tabs(drawing, fields)
                fields |= settings_fields(drawing, num_images)
            with gr.Column():
                status = gr.Markdown("", elem_id="status")
                preview = gr.HTML("", elem_id="preview")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
                gallery = gr.Gallery(
                    label="Your images",
                    columns=4,
                    fit_columns=False,
                    height=420,
                    object_fit="contain",
                    elem_id="gallery",
                    buttons=["download", "fullscreen"],
                    interactive=False,
                )
                selected = gr.State(None)
                with gr.Row():
                    send = {
                        task: gr.Button(SEND[task], size="sm", elem_id=f"send_{task}")
                        for task in sources
                    }
        shown = [status, preview, gallery, selected]
        for task, button in buttons.items():
            inputs = {*fields.values(), *([sources[task]] if task in sources else []), session}
            button.click(
                handler(task, drawing, line, root, fields, sources.get(task), session),
                inputs=inputs,
                outputs=shown,
                show_progress="hidden",
                api_visibility="private",
            )
        connect(page, line, root, session, gallery, selected, status, stop)
        connect_sending(
            drawing.config.channels, root, session, selected, tabs, sources, send, status
        )
    return page


def settings_fields(drawing: Served, num_images: int) -> dict[str, Any]:
    """The components that every task reads, by the names in `Ask`; steps as `steps1` and so on."""
    options, fields = drawing.options, {}
    guided = options["cond_scale"][0] != 1
    with gr.Accordion("Settings", open=True):
        if guided:
            fields["negative_prompt"] = gr.Textbox(
                drawing.given.negative_prompt, label="Negative prompt", elem_id="negative_prompt"
            )
            fields["cond_scale"] = gr.Slider(
                1,
                MOST_GUIDANCE,
                value=min(options["cond_scale"][0], MOST_GUIDANCE),
                step=0.1,
                label="Guidance: how closely to follow the prompt",
                elem_id="cond_scale",
            )
        with gr.Row():
            fields["seed"] = gr.Number(
                drawing.given.seed, label="Seed", precision=0, elem_id="seed", minimum=0
            )
            fields["count"] = gr.Slider(
                1,
                MOST_IMAGES,
                value=min(num_images, MOST_IMAGES),
                step=1,
                label="Images",
                elem_id="count",
            )
        with gr.Row():
            last = options["stop_at_unet_number"]
            for number, steps in enumerate(options["timesteps"][:last], 1):
                fields[f"steps{number}"] = gr.Slider(
                    1,
                    MOST_STEPS,
                    value=min(steps, MOST_STEPS),
                    step=1,
                    label=f"Steps at {pixels(drawing.config.stage(number).size)}",
                    elem_id=f"steps{number}",
                )
            fields["sampler"] = gr.Dropdown(
                [*SAMPLERS],
                value=options["sampler"],
                label="Sampler (a new one is compiled first)",
                elem_id="sampler",
            )
    return fields


def task_tabs(
    drawing: Served, fields: dict[str, Any]
) -> tuple["gr.Tabs", dict[str, Any], dict[str, Any]]:
    """One tab per task; its button and the component with its image, by task. Adds to `fields` what
    only one task reads."""
    last, buttons, sources = drawing.options["stop_at_unet_number"], {}, {}

    def button(task: str, label: str) -> None:
        buttons[task] = gr.Button(label, variant="primary", elem_id=f"run_{task}")

    def image(task: str) -> None:
        sources[task] = gr.Image(
            label="Image",
            type="filepath",
            image_mode=None,
            height=260,
            sources=["upload", "clipboard"],
            elem_id=f"image_{task}",
        )

    with gr.Tabs() as tabs:
        with gr.Tab("Draw", id="text_to_image"):
            button("text_to_image", "Draw")
        if last > 1:
            with gr.Tab(TABS["upscale"], id="upscale"):
                image("upscale")
                choices = [(upscaling(drawing, number), number) for number in range(2, last + 1)]
                fields["stage"] = gr.Dropdown(choices, value=last, label="Stage", elem_id="stage")
                button("upscale", "Upscale")
        with gr.Tab(TABS["inpaint"], id="inpaint"):
            sources["inpaint"] = gr.ImageEditor(
                label="Paint over the part to redraw",
                type="pil",
                format="png",
                layers=False,
                transforms=(),
                sources=("upload",),
                brush=gr.Brush(default_size=60, colors=["#ff2060"], color_mode="fixed"),
                elem_id="editor",
            )
            button("inpaint", "Inpaint")
        with gr.Tab(TABS["image_to_image"], id="image_to_image"):
            image("image_to_image")
            fields["strength"] = gr.Slider(
                0.05,
                1,
                value=0.6,
                step=0.05,
                label="Strength: how much to change",
                elem_id="strength",
            )
            button("image_to_image", "Draw from the image")
    return tabs, buttons, sources


def upscaling(drawing: Served, number: int) -> str:
    """`64 x 64 to 256 x 256`"""
    stage = drawing.config.stage(number)
    return f"{pixels(stage.lowres.size)} to {pixels(stage.size)}"


def pixels(size: Size) -> str:
    """`96 x 64` of (height, width)."""
    return "{} x {}".format(*size[::-1])


@no_type_check  # tests check annotations; `run` would then not look like a generator to gradio
def handler(
    task: str,
    drawing: Served,
    line: Line,
    root: Path,
    fields: dict[str, Any],
    source: Any,
    session: Any,
) -> Callable[..., Iterator[tuple]]:
    """What a task's button does: yields the status, the preview and the gallery."""

    def run(values: dict, request: gr.Request) -> Iterator[tuple]:
        try:
            folder = serving.session_folder(root, values[session])
            given = {name: values[field] for name, field in fields.items()}
            ask = make_ask(task, given, None if source is None else values[source], drawing)
        except UserError as error:
            yield escaped(serving.public(error)), *[gr.skip()] * 3
            return
        written = 0
        for update in serving.draw(drawing, line, ask, folder, request.session_hash):
            new = update.written > written
            written = update.written
            preview = "" if update.over else picture(update.preview)
            yield escaped(update.status), preview, *(refreshed(folder) if new else [gr.skip()] * 2)

    return run


def make_ask(task: str, given: dict[str, Any], source: Any, drawing: Served) -> Ask:
    """The request in a page's fields. Raises UserError for a file that is not an image."""
    given, channels = dict(given), drawing.config.channels
    numbers = range(1, drawing.options["stop_at_unet_number"] + 1)
    steps = tuple(int(given.pop(f"steps{number}") or 0) for number in numbers)
    image = mask = None
    if task == "inpaint" and source is not None and source["background"] is not None:
        background = asking.reduced(source["background"].convert(MODES[channels]))
        image = np.asarray(background).reshape(background.height, background.width, channels)
        mask = asking.painted(source["layers"] or [], image.shape[:2])
    elif task != "inpaint" and source is not None:
        image = asking.read_image(Path(source), channels)
    if given.get("seed") is None:
        raise UserError("The seed is empty: give an integer.")
    whole = {name: int(given.get(name) or 0) for name in ("seed", "count")}
    broken = {n: float(given[n] or 0) for n in ("cond_scale", "strength") if n in given}
    given |= whole | broken | {"stage": int(given.get("stage", numbers[-1]))}
    return Ask(task=task, steps=steps, image=image, mask=mask, **given)


def connect(
    page: Any,
    line: Line,
    root: Path,
    session: Any,
    gallery: Any,
    selected: Any,
    status: Any,
    stop: Any,
) -> None:
    """Connects load, select and stop; none of them waits in a queue."""

    def load(name: str | None) -> tuple:
        try:
            folder = serving.session_folder(root, name)
        except UserError:
            name = serving.new_session()
            folder = serving.session_folder(root, name)
        return name, gallery_of(folder)

    def select(event: gr.SelectData) -> str:
        return Path(event.value["image"]["path"]).name

    def cancel(request: gr.Request) -> Any:
        found = line.cancel(request.session_hash)  # stopped requests report it themselves
        return gr.skip() if found else "There is nothing to stop."

    def gone(request: gr.Request) -> None:
        line.cancel(request.session_hash)

    private = dict(api_visibility="private", show_progress="hidden")
    page.load(load, session, [session, gallery], **private)
    gallery.select(select, None, selected, queue=False, **private)
    stop.click(cancel, None, status, queue=False, **private)
    page.unload(gone)


def connect_sending(
    channels: int,
    root: Path,
    session: Any,
    selected: Any,
    tabs: Any,
    sources: dict,
    send: dict,
    status: Any,
) -> None:
    """Connects the buttons that send the chosen result to another task."""

    def sender(task: str) -> Callable[..., tuple]:
        def sent(name: str | None, session: str | None) -> tuple:
            if name is None:
                return gr.skip(), gr.skip(), "Click one of your images first."
            try:
                path = serving.result(serving.session_folder(root, session), name)
                image = asking.read_image(path, channels)
            except UserError as error:
                return gr.skip(), gr.skip(), escaped(serving.public(error))
            if task != "inpaint":
                return gr.Tabs(selected=task), str(path), ""
            background = asking.enlarged(to_pil(image)).convert("RGB")
            value = {"background": background, "layers": [], "composite": None}
            return gr.Tabs(selected=task), value, ""

        return sent

    for task, button in send.items():
        button.click(
            sender(task),
            [selected, session],
            [tabs, sources[task], status],
            show_progress="hidden",
            api_visibility="private",
        )


def gallery_of(folder: Path) -> list[str]:
    return [str(path) for path in serving.results(folder)]


def refreshed(folder: Path) -> tuple[Any, None]:
    """The gallery, and the chosen result: none, as all have moved by one place."""
    return gr.Gallery(value=gallery_of(folder), selected_index=None), None


def picture(preview: Any) -> Any:
    """A preview as HTML; None keeps the last."""
    if preview is None:
        return gr.skip()
    return f'<img alt="preview" src="{serving.data_url(preview)}">'


def escaped(text: str) -> str:
    """Markdown that shows the text as it is."""
    text = text.replace("\n", "\n\n")
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>()#+!|~&$" else c for c in text)


if __name__ == "__main__":
    commands.run(main)
