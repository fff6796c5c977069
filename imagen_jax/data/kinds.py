"""Which files of a set are what, by their names: the same in a folder and in a tar shard.

Files of one stem are one record: the image, and beside it the caption (`.txt`, `.caption`, or
"caption" in the `.json`, the first of them that is there) and a stored text embedding (`.npy`). The
stem is everything before the last dot, and capitals in what follows it make no difference.
"""

from collections.abc import Callable
from typing import TypeVar

from imagen_jax.data.written import caption, json_object

PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "tiff", "tif", "bmp", "gif", "avif")
CAPTIONS = ("txt", "caption", "json")
BESIDE = (*CAPTIONS, "npy")
OTHER_PICTURES = (
    *("heic", "heif", "jxl", "jp2", "svg", "ico", "tga", "ppm", "pgm", "pnm", "psd", "exr", "hdr"),
    *("raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "mp4", "mov", "webm", "avi", "mkv"),
)
ARCHIVES = ("gz", "tgz", "zst", "bz2", "tbz", "xz", "txz", "zip", "7z", "rar")

Place = TypeVar("Place")


def split_name(name: str) -> tuple[str, str]:
    """A path as its stem and its kind in lower case: `a/one.two.JPG` is `a/one.two` and `jpg`."""
    where, slash, file = name.rpartition("/")
    stem, dot, kind = file.rpartition(".")
    return (f"{where}{slash}{stem}", kind.lower()) if dot else (name, "")


def hidden(name: str) -> bool:
    """Whether a part of the path starts with a dot, as the files that macOS puts beside others."""
    return any(part.startswith(".") for part in name.split("/"))


def why_not(kind: str) -> str | None:
    """Why a file that somebody may take for a picture is none here; None for all other files."""
    if kind in OTHER_PICTURES:
        return f"a .{kind} file, which is not read"
    if kind in ARCHIVES:
        return f"a .{kind} archive, to be unpacked first"
    return None


def read_caption(kinds: dict[str, Place], read: Callable[[Place], bytes]) -> str | None:
    """The caption among the files of a record, kind -> where it is."""
    for kind in CAPTIONS:
        if kind in kinds:
            data = read(kinds[kind])
            return caption(json_object(data).get("caption") if kind == "json" else data)
    return None
