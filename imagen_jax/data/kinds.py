"""What each file of a set is, by its name: the same in a folder and in a tar shard.

Files with the same stem are one record: the image, and beside it the caption (`.txt`, `.caption`,
or "caption" in the `.json`, the first that exists) and a stored text embedding (`.npy`). The stem
is everything before the last dot; what follows it is not case-sensitive. `1.png.txt` is a caption
of `1.png` too.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TypeVar

from imagen_jax.data.written import captions, json_object

# With the extra `heic`, pictures from phones too.
HEIC = ("heic", "heif") if find_spec("pillow_heif") else ()
PICTURES = ("jpg", "jpeg", "jfif", "png", "webp", "tiff", "tif", "bmp", "gif", "avif", *HEIC)
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


def split_beside(name: str) -> tuple[str, str]:
    """As `split_name`, for a file beside a picture; its name may include the picture's kind."""
    stem, kind = split_name(name)
    if kind in BESIDE and split_name(stem)[1] in PICTURES:
        stem = split_name(stem)[0]
    return stem, kind


def hidden(name: str) -> bool:
    """Whether a part of the path starts with a dot, as in files that macOS puts beside others."""
    return any(part.startswith(".") and part != ".." for part in name.split("/"))


def why_not(kind: str) -> str | None:
    """Why a file that could be taken for a picture is not read as one; None for other files."""
    if kind in OTHER_PICTURES and kind not in PICTURES:
        more = " without the extra heic" if kind in ("heic", "heif") else ""
        return f"a .{kind} file, which is not read{more}"
    if kind in ARCHIVES:
        return f"a .{kind} archive, which must be unpacked first"
    return None


def read_captions(
    kinds: Mapping[str, Place],
    read: Callable[[Place], bytes],
    *,
    key: str | None = None,
    by_line: bool = False,
) -> tuple[str, ...]:
    """The captions of a record whose files are `kinds`, kind -> place; with a `key`, those in its
    `.json` under that name. () if there are none. `by_line`: each line of a text file is one."""
    for kind in CAPTIONS if key is None else ("json",):
        if kind in kinds:
            data = read(kinds[kind])
            if kind == "json":
                return captions(json_object(data).get(key or "caption"))
            return captions(data, by_line=by_line)
    return ()
