"""Make the bundled pictures: Fluent emoji on white, captioned with their English names.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && npm pack emojibase-data@17.0.0
    python -m imagen_jax.data.make_bundled --emoji lobehub-fluent-emoji-3d-1.1.0.tgz \\
        --captions emojibase-data-17.0.0.tgz --out imagen_jax/data/bundled/00000.tar

One img2dataset-style shard: NNNNNNNNN.webp, .txt (the caption), .json (code points, group, split).
Flags and symbols are left out because they are signs and not things, as are skin-tone variants,
which share their caption. The same inputs and the same libwebp give the same bytes.
"""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from imagen_jax.data.records import hashed_heldout

HELDOUT_FRACTION = 1 / 16
LEFT_OUT = ("component", "symbols", "flags")


@dataclass(frozen=True)
class Arguments:
    """Make the shard of bundled pictures from two npm packages."""

    emoji: Path  # lobehub-fluent-emoji-3d-1.1.0.tgz
    captions: Path  # emojibase-data-17.0.0.tgz
    out: Path = Path("imagen_jax/data/bundled/00000.tar")
    size: int = 128  # pixels a side
    quality: int = 85  # WebP, lossy


def main(arguments: Arguments) -> None:
    """Write the shard and print what is in it."""
    names = _names(arguments.captions)
    heldout = hashed_heldout([name["caption"] for name in names], HELDOUT_FRACTION)
    with tarfile.open(arguments.emoji) as files:
        emoji = {_code(Path(m.name).stem): files.extractfile(m).read() for m in files if m.isfile()}
    drawn = [
        name | {"split": "heldout" if apart else "train"}
        for name, apart in zip(names, heldout, strict=True)
        if _code(name["hexcode"]) in emoji
    ]
    with tarfile.open(arguments.out, "w") as shard:
        for number, name in enumerate(drawn):
            picture = emoji[_code(name["hexcode"])]
            webp = _on_white(picture, size=arguments.size, quality=arguments.quality)
            _add(shard, f"{number:09d}.webp", webp)
            _add(shard, f"{number:09d}.txt", name["caption"].encode())
            _add(shard, f"{number:09d}.json", json.dumps(name, ensure_ascii=False).encode())
    apart = sum(name["split"] == "heldout" for name in drawn)
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {len(drawn)} pictures, {apart} of them held out, {size:.1f} MB")


def _names(package: Path) -> list[dict]:
    """Caption, group, tags and code points of every emoji wanted, in Unicode's order."""
    with tarfile.open(package) as files:
        emoji = json.load(files.extractfile("package/en/data.json"))
        groups = json.load(files.extractfile("package/en/messages.json"))["groups"]
    group = {entry["order"]: entry["key"] for entry in groups}
    wanted = [e for e in emoji if "group" in e and group[e["group"]] not in LEFT_OUT]
    return [
        {
            "caption": entry["label"],
            "hexcode": entry["hexcode"],
            "group": group[entry["group"]],
            "tags": entry.get("tags", []),
        }
        for entry in sorted(wanted, key=lambda entry: entry["order"])
    ]


def _code(hexcode: str) -> str:
    """The two packages disagree about case and about the variation selector FE0F."""
    return hexcode.lower().replace("-fe0f", "")


def _on_white(picture: bytes, *, size: int, quality: int) -> bytes:
    """Centre square of a picture with alpha, on white, resized with antialias."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    out = io.BytesIO()
    flat = white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    flat.save(out, "webp", quality=quality, method=6)
    return out.getvalue()


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file with a fixed date and no owner, so that the shard is reproducible."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
