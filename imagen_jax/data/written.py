"""Text that people wrote: captions, and files with one caption or prompt per line."""

import json
import os
from pathlib import Path
from typing import Any

from imagen_jax.errors import UserError

BYTE_ORDER_MARK = "\ufeff"


def caption(value: Any) -> str | None:
    """A caption from the bytes of a file or a field of a record; None if there is none.

    White space around it is trimmed; an empty one stays empty. Raises UserError for bytes that are
    not UTF-8, half of a surrogate pair (JSON's escapes can have one), and values that are not text.
    """
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode().removeprefix(BYTE_ORDER_MARK)
        except UnicodeDecodeError as error:
            raise UserError("the caption is not UTF-8") from error
    if not isinstance(value, str):
        raise UserError(f"the caption is not text but {type(value).__name__}")
    if not is_unicode(value):
        raise UserError("the caption contains half of a surrogate pair")
    return value.strip()


def captions(value: Any, *, by_line: bool = False) -> tuple[str, ...]:
    """All captions in a field of a record, a string or a list of them, or in the bytes of a file;
    with `by_line` each line is one. Empty ones are left out if there are others. See `caption`."""
    if isinstance(value, (list, tuple)):
        found = [caption(one) for one in value]
    else:
        text = caption(value)
        lines = text.splitlines() if text and by_line else [text]
        found = [line and line.strip() for line in lines]
    full = tuple(one for one in found if one)
    return full or tuple(one for one in found if one is not None)[:1]


def json_object(data: bytes | None) -> dict[str, Any]:
    """The JSON object of a record, {} if it has none. Raises UserError for anything else."""
    if data is None:
        return {}
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged .json: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError("the .json is not an object")
    return value


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a text file, trimmed, without the empty ones.

    Lines end with LF, CRLF or CR: Unicode's other line separators are text. A byte-order mark is
    not part of the first line. Raises UserError naming the file, and the line that is not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def is_unicode(text: str) -> bool:
    """False for text with half of a surrogate pair, such as a file name that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """A name to print: bytes that are not UTF-8, and line breaks, as escapes."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return text.replace("\n", "\\n").replace("\r", "\\r")
