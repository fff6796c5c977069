"""What the page does, without the page: checked requests, one queue, previews, results by session.

Ask -> checked -> Line (one drawing at a time) -> draw -> Updates
"""

import base64
import dataclasses
import io
import queue
import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps

from imagen_jax import data, storage
from imagen_jax.config import ImagenConfig
from imagen_jax.diffusion.samplers import SAMPLERS
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Embeddings, repeated
from imagen_jax.pixels import to_pil
from imagen_jax.sampling import OnStep
from imagen_jax.stage import Stage
from imagen_jax.types import AnyArray, Size
from sample import inpaint, upscale
from sample.drawing import Drawing, Finish, Job

MOST_IMAGES = 16
MOST_STEPS = 250
MOST_GUIDANCE = 20.0
MOST_CHARACTERS = 2_000  # of a prompt; what is longer is cut
MOST_PIXELS = 50_000_000  # of an image that is sent
MOST_WAITING = 20
MOST_SHOWN = 200
GUIDED = 1 + 1e-6
"""In place of guidance 1: exactly 1 is another program, which the slider must not compile."""
PREVIEW_PAUSE = 0.25  # seconds between two previews
MOST_UPSCALED = 2**20  # pixels of an image that is upscaled
OVERLAP, TILE_BATCH = 0.25, 8  # of the tiles in which it is
TILE = 256  # pixels: a preview's image is at least this large

Task = Literal["text_to_image", "upscale", "inpaint", "image_to_image"]
Pixels = UInt8[np.ndarray, "h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """What a visitor asks for."""

    task: Task = "text_to_image"
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    count: int = 1
    cond_scale: float = 1.0
    """Of the base; the other stages have the command line's."""
    steps: tuple[int, ...]
    """One per U-Net that runs."""
    sampler: str
    image: Pixels | None = None
    """To upscale, to inpaint or to start from, of the cascade's channels."""
    mask: Bool[np.ndarray, "h w"] | None = None
    """True where an inpainted image is drawn again."""
    strength: float = 0.6
    stage: int = 2
    """Number of the U-Net that upscales."""


class Update(NamedTuple):
    """What the page shows next."""

    status: str
    preview: Image.Image | None = None
    """None leaves the last."""
    written: int = 0
    """Images that this request has written so far."""
    over: bool = False


class Cancelled(Exception):
    """The visitor has stopped the drawing, or gone."""


# ---- requests


def checked(ask: Ask, config: ImagenConfig) -> tuple[Ask, list[str]]:
    """The request as it is drawn, and what was changed. Raises UserError for unfit values."""
    notes = []
    for name, (least, most) in {
        "number of images": (1, MOST_IMAGES),
        "seed": (0, 2**32 - 1),
        "guidance": (1, MOST_GUIDANCE),
        "strength": (0.01, 1),
    }.items():
        field = {"number of images": "count", "guidance": "cond_scale"}.get(name, name)
        value = getattr(ask, field)
        if value is None or not least <= value <= most:
            raise UserError(f"The {name} must be from {least:g} to {most:g}, not {value}.")
    if not all(1 <= steps <= MOST_STEPS for steps in ask.steps):
        raise UserError(f"Steps must be from 1 to {MOST_STEPS}, not {list(ask.steps)}.")
    if ask.sampler not in SAMPLERS:
        raise UserError(f"The sampler is one of {', '.join(SAMPLERS)}.")
    texts = {}
    for name, title in (("prompt", "prompt"), ("negative_prompt", "negative prompt")):
        texts[name] = valid(getattr(ask, name))
        if len(texts[name]) > MOST_CHARACTERS:
            notes.append(
                f"The {title} has {len(texts[name]):,} characters; only the first "
                f"{MOST_CHARACTERS:,} are read."
            )
            texts[name] = texts[name][:MOST_CHARACTERS]
    if config.condition_on_text and not texts["prompt"]:
        raise UserError("Say what to draw: the prompt is empty.")
    if ask.task != "text_to_image":
        _check_image(ask)
    return dataclasses.replace(ask, **texts), notes


def valid(text: str) -> str:
    """In one line, without surrogates, which a file cannot hold."""
    return " ".join(text.encode(errors="replace").decode().split())


def _check_image(ask: Ask) -> None:
    if ask.image is None:
        raise UserError("Choose an image first: click one of your results, or upload one.")
    if ask.task == "inpaint" and (ask.mask is None or not ask.mask.any()):
        raise UserError("Paint over what is to be drawn again: the mask is empty.")


class Inputs(NamedTuple):
    """Arguments of `Drawing.draw` that come from a visitor's image."""

    images: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    finish: Finish | None = None
    first: int = 1


def inputs(ask: Ask, config: ImagenConfig, last: int) -> Inputs:
    """The visitor's image, in the sizes of the stages that read it; `last` is the last to run.

    Raises UserError for a mask that the cascade's aspect ratio cannot hold.
    """

    def rows(array: np.ndarray) -> np.ndarray:
        return np.repeat(array[None], ask.count, axis=0)

    if ask.task == "upscale":
        return _upscaling(ask, config.stage(ask.stage), rows)
    if ask.task == "inpaint":
        size = config.stage(last).size
        box = inpaint.find_box(ask.mask, size)
        known = inpaint.scaled(box.of(ask.image), size)
        kept = ~inpaint.scaled_mask(box.of(ask.mask), size)
        return Inputs(
            {"inpaint_images": rows(known), "inpaint_masks": rows(kept)},
            finish=lambda _, drawn: inpaint.composed(ask.image, ask.mask, box, drawn),
        )
    if ask.task == "image_to_image":
        sizes = [config.stage(number).size for number in range(1, len(config.unets) + 1)]
        large = [n == 0 or np.all(ask.image.shape[:2] >= np.array(s)) for n, s in enumerate(sizes)]
        sources = [
            rows(fitted(ask.image, size)) if enough else None
            for size, enough in zip(sizes, large, strict=True)
        ]
        return Inputs({"init_images": tuple(sources)}, {"strength": ask.strength})
    return Inputs()


def _upscaling(ask: Ask, stage: Stage, rows: Callable[[np.ndarray], np.ndarray]) -> Inputs:
    height, width = ask.image.shape[:2]
    if height * width > MOST_UPSCALED:
        raise UserError(
            f"The image has {height * width:,} pixels; at most {MOST_UPSCALED:,} are upscaled."
        )
    factor = upscale.scale_factor(stage)
    padded, tiles = upscale.plan(ask.image, stage, OVERLAP)
    return Inputs(
        {"start_image_or_video": rows(padded)},
        {
            "start_at_unet_number": stage.unet_number,
            "tiles": tiles,
            "tile_batch": min(TILE_BATCH, len(tiles.origins)),
        },
        finish=lambda _, larger: larger[: factor * height, : factor * width],
        first=stage.unet_number,
    )


def fitted(image: Pixels, size: Size) -> UInt8[np.ndarray, "h2 w2 c"]:
    """The image of (height, width) `size`: covered and cropped to its centre, never squashed."""
    found = ImageOps.fit(to_pil(image), size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(found).reshape(*size, image.shape[-1])


def enlarged(image: Image.Image, least: int = 2 * TILE) -> Image.Image:
    """With pixels repeated until both sides have `least`, for painting on it."""
    factor = max(1, -(-least // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def reduced(image: Image.Image) -> Image.Image:
    """Undoes `enlarged`, to the bit; any other image as it is."""
    for factor in range(2 * TILE, 1, -1):
        if image.width % factor == image.height % factor == 0:
            size = image.width // factor, image.height // factor
            small = image.resize(size, Image.Resampling.NEAREST)
            again = enlarged(small) if min(size) >= 8 else None
            if again is not None and again.size == image.size and again == image:
                return small
    return image


def painted(layers: Sequence[Image.Image], size: Size) -> Bool[np.ndarray, "h w"]:
    """True where a layer of an image editor has paint, for an image of (height, width) `size`.

    A pixel counts where half of it is painted, so that the brush's soft edge does not.
    """
    found = np.zeros(size, bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(size[::-1], Image.Resampling.BOX)
        found |= np.asarray(alpha) >= 128
    return found


def arguments(ask: Ask, options: Mapping[str, Any], given: Inputs) -> dict[str, Any]:
    """Arguments of `Imagen.sample` where they differ from `options`, the command line's."""
    scale, steps = options["cond_scale"], options["timesteps"]
    if scale[0] != 1:
        scale = (max(ask.cond_scale, GUIDED), *scale[1:])
    steps = ask.steps + tuple(steps)[len(ask.steps) :]
    return {"cond_scale": scale, "timesteps": steps, "sampler": ask.sampler, **given.options}


# ---- the queue


@dataclasses.dataclass(eq=False)
class Ticket:
    owner: str
    """The page that asks; its Stop cancels all of its own."""
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)


class Line:
    """Requests wait here, first come, first served: the device draws one at a time."""

    def __init__(self, most: int = MOST_WAITING):
        self._tickets: list[Ticket] = []
        self._changed = threading.Condition()
        self._most = most

    def join(self, owner: str) -> Ticket:
        """Raises UserError if too many wait."""
        with self._changed:
            if len(self._tickets) > self._most:
                raise UserError(f"{self._most} others are waiting: try again in a few minutes.")
            self._tickets.append(ticket := Ticket(owner))
            return ticket

    def place(self, ticket: Ticket, wait: float = 0.0) -> int:
        """How many are before it; if any, after a change or `wait` seconds. Raises Cancelled."""
        with self._changed:
            if wait and self._tickets[0] is not ticket and not ticket.cancelled.is_set():
                self._changed.wait(wait)
            if ticket.cancelled.is_set():
                raise Cancelled
            return self._tickets.index(ticket)

    def leave(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
            self._changed.notify_all()

    def cancel(self, owner: str) -> int:
        """Stops what a page has asked for, drawn or waiting; returns how many requests."""
        with self._changed:
            own = [ticket for ticket in self._tickets if ticket.owner == owner]
            for ticket in own:
                ticket.cancelled.set()
            self._changed.notify_all()
            return len(own)


# ---- drawing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served(Drawing):
    """A `Drawing` whose notes go to the page, and which reads the encoder once for a text."""

    notes: list[str] = dataclasses.field(default_factory=list)
    encoded: dict[tuple, tuple] = dataclasses.field(default_factory=dict)

    def say(self, line: str) -> None:
        self.notes.append(line)

    def encode(self, jobs: Sequence[Job]) -> tuple[Embeddings | None, Embeddings | None]:
        """All jobs of a request have one prompt."""
        if not self.config.condition_on_text:
            return None, None
        texts = jobs[0].prompt, jobs[0].negative_prompt
        if texts not in self.encoded:
            while len(self.encoded) >= MOST_WAITING:
                del self.encoded[next(iter(self.encoded))]
            before = len(self.notes)
            found = super().encode(jobs[:1])
            self.encoded[texts] = found, tuple(self.notes[before:])
        else:
            self.notes.extend(self.encoded[texts][1])
        return tuple(part and repeated(part, len(jobs)) for part in self.encoded[texts][0])

    def _shared_recipe(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Without what is not a setting."""
        left_out = ("on_step", "init_images")
        kept = {name: value for name, value in options.items() if name not in left_out}
        return super()._shared_recipe(kept)

    def of_request(self, ask: Ask, folder: Path, first: int) -> "Served":
        """With the command whose recipe this is, the visitor's folder, and notes of its own."""
        given = dataclasses.replace(
            self.given, seed=ask.seed, negative_prompt=ask.negative_prompt, out=folder
        )
        return dataclasses.replace(self, command=ask.task, given=given, first=first, notes=[])


def draw(drawing: Served, line: Line, ask: Ask, folder: Path, owner: str) -> Iterator[Update]:
    """Draws into `folder` when it is this request's turn.

    Never raises for a mistake: the last update has the line to show. Closing the iterator stops
    the drawing, after the step it is at.
    """
    ticket, started, written, last = None, False, 0, None
    try:
        ask, notes = checked(ask, drawing.config)
        ticket = line.join(owner)
        while before := line.place(ticket, wait=0.5):
            yield Update(f"In the queue: {before} before you.")
        events: queue.Queue = queue.Queue()
        work = threading.Thread(
            target=_work, args=(drawing, line, ticket, ask, folder, notes, events), daemon=True
        )
        started = True
        work.start()
        for update in _updates(events, ask.count):
            written = update.written
            if ticket.cancelled.is_set() and not update.over:
                update = update._replace(status="Stopping after this step.")
            yield update
    except Cancelled:
        last = Update(f"Stopped; {written} of {ask.count} images were finished.", over=True)
    except Exception as error:
        last = Update(public(error), over=True)
    finally:
        if ticket is not None:
            ticket.cancelled.set()
            if not started:
                line.leave(ticket)
    if last is not None:
        yield last


def _work(
    drawing: Served,
    line: Line,
    ticket: Ticket,
    ask: Ask,
    folder: Path,
    notes: list[str],
    events: queue.Queue,
) -> None:
    """Draws in a thread of its own, and says what happens in `events`."""
    try:
        given = inputs(ask, drawing.config, drawing.given.last_stage(drawing.config))
        own = drawing.of_request(ask, folder, given.first)
        prompts = [ask.prompt] if drawing.config.condition_on_text else None
        drawn = own.draw(
            own.jobs(prompts, ask.count),
            images=given.images,
            finish=given.finish,
            on_step=listener(ticket, events, ask.count, previews=_may_preview(own)),
            **arguments(ask, drawing.options, given),
        )
        for _ in drawn:
            events.put("written")
        said = [note.removeprefix("note: ") for note in own.notes]
        events.put(Update("\n".join(["Done.", *notes, *map(without_paths, said)]), over=True))
    except BaseException as error:
        events.put(error)
    finally:
        line.leave(ticket)


def _may_preview(drawing: Drawing) -> bool:
    """A safety checker sees finished images only: nothing is shown before it."""
    return drawing.given.safety_checker is None


def listener(ticket: Ticket, events: queue.Queue, count: int, *, previews: bool = True) -> OnStep:
    """An `on_step` that stops when the ticket is cancelled, and shows some of the estimates."""
    last = 0.0

    def on_step(number: int, done: int, steps: int, estimates: AnyArray) -> None:
        nonlocal last
        if ticket.cancelled.is_set():
            raise Cancelled
        preview = None
        if previews and (time.monotonic() - last > PREVIEW_PAUSE or done == steps):
            preview = sheet(np.asarray(estimates)[:count])
            last = time.monotonic()
        events.put(Update(f"U-Net {number}: step {done} of {steps}.", preview))

    return on_step


def _updates(events: queue.Queue, count: int) -> Iterator[Update]:
    """Everything that has happened meanwhile as one update. Raises the worker's error."""
    status = "Getting ready: what is new is compiled first, which takes a while."
    written = 0
    while True:
        happened, preview = [], None
        try:
            happened.append(events.get(timeout=0.5))
            while not events.empty():
                happened.append(events.get())
        except queue.Empty:
            pass  # the same again: a page that is gone is noticed when it is sent something
        for event in happened:
            if isinstance(event, BaseException):
                raise event
            if event == "written":
                written += 1
                continue
            if event.over:
                yield event._replace(written=written)
                return
            status, preview = event.status, event.preview or preview
        done = f" {written} of {count} images are finished." if written else ""
        yield Update(status + done, preview, written)


def sheet(images: Float[np.ndarray, "n h w c"]) -> Image.Image:
    """The images side by side, in about a square."""
    tiles = [to_pil(np.nan_to_num(image)).convert("RGB") for image in images]
    columns = int(np.ceil(np.sqrt(len(tiles))))
    factor = max(1, TILE // min(tiles[0].size))
    width, height = (factor * side for side in tiles[0].size)
    page = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        page.paste(tile.resize((width, height)), (column * width, row * height))
    page.thumbnail((4 * TILE, 4 * TILE))
    return page


def data_url(image: Image.Image) -> str:
    """The image inside a page, so that previews leave no files."""
    file = io.BytesIO()
    image.save(file, "jpeg", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


# ---- messages


def public(error: BaseException) -> str:
    """The error in one line for the page: no path of the machine. What is a bug is printed here."""
    if isinstance(error, UserError):
        return without_paths(str(error))
    if isinstance(error, OSError):
        why = error.strerror or "input/output error"
        return f"The server could not read or write a file: {why}."
    traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return "The device's memory is full: draw fewer images at once."
    return "Something went wrong on the server; its log says what."


def without_paths(text: str) -> str:
    """`/home/me/runs/demo is` -> `demo is`."""
    return re.sub(r"(?<![\w.])(?:\w+:/)?/(?:[^\s/:'\"]+/)*(?=[^\s/])", "", text)


# ---- results


def new_session() -> str:
    """Names a visitor's folder; who does not know it cannot see it."""
    return secrets.token_hex(8)


def session_folder(root: Path, session: str | None) -> Path:
    """Raises UserError for a name that `new_session` did not make: it comes from the browser."""
    if not re.fullmatch(r"[0-9a-f]{16}", session or ""):
        raise UserError("This page has no session: load it again.")
    return root / session


def results(folder: Path) -> list[Path]:
    """A visitor's images, the newest first."""
    found = [path for path in folder.glob("*.*") if path.suffix in (".png", ".jpeg", ".webp")]
    found.sort(key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    return found[:MOST_SHOWN]


def result(folder: Path, name: str) -> Path:
    """The file of a result by its name. Raises UserError if it is gone."""
    path = folder / Path(name).name
    if path not in results(folder):
        raise UserError("This image is no longer there: load the page again.")
    return path


def read_image(path: Path, channels: int) -> Pixels:
    """An image that was sent or drawn. Raises UserError for a file that is none, or too large."""
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
        too_large = width * height > MOST_PIXELS
    except Image.DecompressionBombError:
        too_large = True
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError("The file is not an image that can be read: send a PNG or JPEG.") from error
    if too_large:
        raise UserError(f"The image is too large: at most {MOST_PIXELS:,} pixels are read.")
    return data.read(content, channels=channels)


def local_root(drawing: Drawing) -> Path:
    """Where sessions are. Raises UserError for an object store, which the page cannot show."""
    folder = drawing.folder
    if storage.is_remote(folder):
        raise UserError(f"--out: the page shows files of a local folder, not of {folder}.")
    return Path(folder)
