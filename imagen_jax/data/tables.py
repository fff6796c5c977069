"""Tables of images and captions, as a `Source`: `.csv`, `.tsv`, `.jsonl` and `.parquet` files, and
the `metadata.*` of a Hugging Face image folder.

A row has an image, as a path relative to the table's folder or as the bytes of a file (Parquet),
and captions. Rows with the same path are captions of one image. Other columns are for `--where` and
`--template`.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imagen_jax.data import files, kinds
from imagen_jax.data.readers import found_captions, make_source, read_beside
from imagen_jax.data.records import Record, Source, Strings, required
from imagen_jax.data.written import captions
from imagen_jax.errors import UserError, first_line

TABLES = ("csv", "tsv", "jsonl", "parquet")
METADATA = tuple(f"metadata.{kind}" for kind in TABLES)
IMAGE_KEYS = (
    *("image", "file_name", "image_path", "path", "filepath", "filename", "file", "img", "jpg"),
)

Row = Mapping[str, Any]


def table(
    path: str,
    *,
    heldout_fraction: float,
    image_key: str | None = None,
    caption_key: str | None = None,
    names: Iterable[str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Source:
    """The images of a table. Keys are their paths, or `row N` if the table itself has the images.

    `names` are the files beside it; pictures among them that it does not name are left out, and so
    are damaged rows, listed by number. Raises UserError for a table that cannot be read, or has no
    column of images.
    """
    left_out = dict(left_out or {})
    rows = _read(path, left_out)
    if not rows:
        raise UserError(f"{path} contains no rows")
    known = list(dict.fromkeys(name for row in rows[:100] for name in row))
    key = image_key or next((name for name in IMAGE_KEYS if name in known), None)
    if key is None or key not in known:
        wanted = repr(image_key) if image_key else f"of images ({', '.join(IMAGE_KEYS)})"
        raise UserError(f"{path}: no column {wanted}; it has {', '.join(known)}; see --image-key")
    if caption_key is not None and caption_key not in known:
        raise UserError(f"{path}: no column {caption_key!r}; it has {', '.join(known)}")
    by_name: dict[str, list[Row]] = {}
    for number, row in enumerate(rows, 1):
        name = _name(row.get(key), number)
        if name is None:
            left_out[f"row {number}"] = "no image"
        elif name.startswith(("http://", "https://")):
            raise UserError(
                f"{path} contains image URLs: download the images first, into shards (img2dataset)"
            )
        else:
            by_name.setdefault(name, []).append(row)
    left_out |= {
        name: f"not in {path.rpartition('/')[2]}"
        for name in names or ()
        if kinds.split_name(name)[1] in kinds.PICTURES and name not in by_name
    }
    if not by_name:
        raise UserError(f"{path} names no images")
    folder = path.rpartition("/")[0]
    keys = Strings.of(by_name)
    read = _TableReader(folder, keys, tuple(by_name.values()), key, caption_key)
    return make_source(path, keys, read, heldout_fraction, left_out=left_out)


@dataclass(frozen=True)
class _TableReader:
    folder: str
    keys: Sequence[str]
    rows: tuple[list[Row], ...]  # per image
    image_key: str
    caption_key: str | None

    def __call__(self, i: int) -> Record:
        image = _bytes(self.rows[i][0][self.image_key])
        if image is None:
            image = read_beside("" if _is_absolute(self.keys[i]) else self.folder, self.keys[i])
        return Record.of(self.keys[i], image, self._captions(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return required(self._captions(i))

    def columns(self, i: int) -> Row:
        return {name: value for name, value in self.rows[i][0].items() if name != self.image_key}

    def _captions(self, i: int) -> tuple[str, ...]:
        found = [found_captions(row, self.caption_key) for row in self.rows[i]]
        return captions([one for row in found for one in row])


def _name(image: Any, number: int) -> str | None:
    """The path of an image, or the row's number if the table has the image itself, as paths may
    then repeat; None if there is no image."""
    if _bytes(image):
        return f"row {number}"
    if isinstance(image, Mapping):
        return image.get("path")
    return str(image) if image else None


def _bytes(image: Any) -> bytes | None:
    if isinstance(image, Mapping):
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None


def _is_absolute(name: str) -> bool:
    return name.startswith("/") or "://" in name


def _read(path: str, left_out: dict[str, str]) -> list[Row]:
    kind = kinds.split_name(path)[1]
    if kind == "parquet":
        return _read_parquet(path)
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    if kind == "jsonl":
        return _read_jsonl(text, left_out)
    return _read_csv(path, text, "\t" if kind == "tsv" else ",", left_out)


def _read_jsonl(text: str, left_out: dict[str, str]) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            left_out[f"line {number}"] = "not a JSON object"
    return rows


def _read_csv(path: str, text: str, delimiter: str, left_out: dict[str, str]) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                fields = len(reader.fieldnames or ())
                left_out[f"line {reader.line_num}"] = f"not {fields} fields"
            else:
                rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def _read_parquet(path: str) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs: pip install -e '.[hf]'") from error
    try:
        with files.open_binary(path) as file:
            return parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} is not Parquet: {first_line(error)}") from error
