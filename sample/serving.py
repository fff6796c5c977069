"""What the page does, without the page: one queue, previews, results by session.

Ask -> checked (asking.py) -> Line (one drawing at a time) -> draw -> Updates
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from imagen_jax import storage
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Embeddings, repeated
from imagen_jax.pixels import to_pil
from imagen_jax.sampling import OnStep
from imagen_jax.types import AnyArray
from sample.asking import Ask, arguments, checked, inputs
from sample.drawing import Drawing, Job

MOST_WAITING = 20
MOST_SHOWN = 200
PREVIEW_PAUSE = 0.25  # seconds between two previews
TILE = 256  # pixels: a preview's image is at least this large


class Update(NamedTuple):
    """What the page shows next."""

    status: str
    preview: Image.Image | None = None
    """None keeps the last one."""
    written: int = 0
    """Images that this request has written so far."""
    over: bool = False


class Cancelled(Exception):
    """The visitor has stopped the drawing, or left."""


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
        """Raises UserError if too many are waiting."""
        with self._changed:
            if len(self._tickets) > self._most:
                raise UserError(f"{self._most} others are waiting: try again in a few minutes.")
            self._tickets.append(ticket := Ticket(owner))
            return ticket

    def place(self, ticket: Ticket, wait: float = 0.0) -> int:
        """How many are before it; if any, waits `wait` seconds for a change. Raises Cancelled."""
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
        """Stops a page's requests, running or waiting; returns how many."""
        with self._changed:
            own = [ticket for ticket in self._tickets if ticket.owner == owner]
            for ticket in own:
                ticket.cancelled.set()
            self._changed.notify_all()
            return len(own)


# ---- drawing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served(Drawing):
    """A `Drawing` whose notes go to the page, and which encodes each text once."""

    notes: list[str] = dataclasses.field(default_factory=list)
    encoded: dict[tuple, tuple] = dataclasses.field(default_factory=dict)

    def say(self, line: str) -> None:
        self.notes.append(line)

    def encode(self, jobs: Sequence[Job]) -> tuple[Embeddings | None, Embeddings | None]:
        """All jobs of a request have the same prompt."""
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
        """Leaves out what is not a setting."""
        left_out = ("on_step", "init_images")
        kept = {name: value for name, value in options.items() if name not in left_out}
        return super()._shared_recipe(kept)

    def of_request(self, ask: Ask, folder: Path, first: int) -> "Served":
        """For one request: with its command in the recipe, the visitor's folder, and new notes."""
        given = dataclasses.replace(
            self.given, seed=ask.seed, negative_prompt=ask.negative_prompt, out=folder
        )
        return dataclasses.replace(self, command=ask.task, given=given, first=first, notes=[])


def draw(drawing: Served, line: Line, ask: Ask, folder: Path, owner: str) -> Iterator[Update]:
    """Draws into `folder` when it is this request's turn.

    Never raises for a mistake: the last update has the line to show. Closing the iterator stops
    the drawing after the current step.
    """
    ticket, started, written, last = None, False, 0, None
    try:
        ask, notes = checked(ask, drawing.config)
        ticket = line.join(owner)
        while before := line.place(ticket, wait=0.5):
            yield Update(f"In the queue: {before} ahead of you.")
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
    """Draws in its own thread, and reports what happens in `events`."""
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
    """False with a safety checker: it sees only finished images, and nothing is shown before."""
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
    """Combines all events since the last update into one. Raises the worker's error."""
    status = "Getting ready: new settings are compiled first, which takes a while."
    written = 0
    while True:
        happened, preview = [], None
        try:
            happened.append(events.get(timeout=0.5))
            while not events.empty():
                happened.append(events.get())
        except queue.Empty:
            pass  # repeat the last one: only sending something shows that a page is gone
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
    """The images side by side, in roughly a square."""
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
    """The error in one line for the page, without the machine's paths. Bugs are printed here."""
    if isinstance(error, UserError):
        return without_paths(str(error))
    if isinstance(error, OSError):
        why = error.strerror or "input/output error"
        return f"The server could not read or write a file: {why}."
    traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return "The device is out of memory: draw fewer images at once."
    return "Something went wrong on the server: see its log."


def without_paths(text: str) -> str:
    """`/home/me/runs/demo is` -> `demo is`."""
    return re.sub(r"(?<![\w.])(?:\w+:/)?/(?:[^\s/:'\"]+/)*(?=[^\s/])", "", text)


# ---- results


def new_session() -> str:
    """The name of a visitor's folder, which nobody can see without knowing the name."""
    return secrets.token_hex(8)


def session_folder(root: Path, session: str | None) -> Path:
    """Raises UserError for a name that `new_session` did not make: it comes from the browser."""
    if not re.fullmatch(r"[0-9a-f]{16}", session or ""):
        raise UserError("This page has no session: reload it.")
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
        raise UserError("This image no longer exists: reload the page.")
    return path


def local_root(drawing: Drawing) -> Path:
    """Where sessions are. Raises UserError for an object store, which the page cannot show."""
    folder = drawing.folder
    if storage.is_remote(folder):
        raise UserError(f"--out: the page can only show files in a local folder, not in {folder}.")
    return Path(folder)
