"""Reads array_record files of `tf.train.Example`s, without TensorFlow.

    message Example  { Features features = 1; }
    message Features { map<string, Feature> feature = 1; }
    message Feature  { BytesList bytes_list = 1; FloatList float_list = 2;
                       Int64List int64_list = 3; }

Each list has its values in field 1, with numbers packed (tensorflow/core/example/feature.proto).
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from imagen_jax.data import files
from imagen_jax.data.readers import found_captions, make_source
from imagen_jax.data.records import Record, Source, Strings
from imagen_jax.errors import UserError, first_line

IMAGE_KEYS = ("image", "image/encoded", "jpg", "jpeg", "png", "webp", "image_bytes")

Value = list[bytes] | list[float] | list[int]


def array_records(
    paths: Sequence[str],
    *,
    heldout_fraction: float,
    image_key: str | None = None,
    caption_key: str | None = None,
) -> Source:
    """The images of array_record files. Keys are FILE/NUMBER, where FILE is the file's stem.

    Raises UserError for files that are not array_record, or have no examples with an image.
    """
    try:
        records = ArrayRecordDataSource(list(paths))
        sizes = [len(ArrayRecordDataSource(path)) for path in paths]
        first = parse(records[0]) if sum(sizes) else {}
    except UserError as error:
        raise UserError(f"{paths[0]}: its records are not tf.train.Example: {error}") from error
    except Exception as error:  # array_record raises many types
        raise UserError(f"{paths[0]} cannot be read: {first_line(error)}") from error
    key = image_key or next((name for name in IMAGE_KEYS if name in first), None)
    if key not in first:
        has = ", ".join(first) or "none"
        raise UserError(f"{paths[0]}: no image feature (it has {has}); see --image-key")
    keys = Strings.of(
        f"{files.stem(path)}/{i}" for path, n in zip(paths, sizes, strict=True) for i in range(n)
    )
    name = paths[0] if len(paths) == 1 else f"{len(paths)} array_record files, {paths[0]} first"
    return make_source(name, keys, _Reader(records, keys, key, caption_key), heldout_fraction)


@dataclass(frozen=True)
class _Reader:
    records: ArrayRecordDataSource
    keys: Sequence[str]
    image_key: str
    caption_key: str | None

    def __call__(self, i: int) -> Record:
        example = parse(self.records[i])
        image = example.get(self.image_key)
        if not image or not isinstance(image[0], bytes):
            raise UserError(f"no image in the feature {self.image_key!r}")
        return Record.of(self.keys[i], image[0], found_captions(example, self.caption_key))

    def columns(self, i: int) -> Mapping[str, Any]:
        """The other features; lists of one value as that value."""
        example = parse(self.records[i])
        return {
            name: _readable(values[0] if len(values) == 1 else values)
            for name, values in example.items()
            if name != self.image_key
        }


def _readable(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def parse(record: bytes) -> dict[str, Value]:
    """The features of a serialised `tf.train.Example`. Raises UserError for anything else."""
    found: dict[str, Value] = {}
    try:
        for number, features in _fields(record):
            for entry in _all(features, 1) if number == 1 else ():
                name, value = (_all(entry, field)[-1] for field in (1, 2))
                found[name.decode()] = _values(value)
    except (IndexError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"damaged: {first_line(error)}") from error
    return found


def _values(feature: bytes) -> Value:
    for kind, values in _fields(feature):
        if kind == 1:
            return _all(values, 1)
        packed = b"".join(one for one in _all(values, 1) if isinstance(one, bytes))
        loose = [one for one in _all(values, 1) if not isinstance(one, bytes)]
        if kind == 2:
            return loose or list(struct.unpack(f"<{len(packed) // 4}f", packed))
        return [_signed(one) for one in loose or _varints(packed)]
    return []


def _all(message: bytes, number: int) -> list[Any]:
    return [value for field, value in _fields(message) if field == number]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: varints as int, 32-bit floats as float, others as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
        elif tag & 7 == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("a field extends past the end of the record")
            value, at = message[at : at + length], at + length
        elif tag & 7 == 5:
            (value,), at = struct.unpack_from("<f", message, at), at + 4
        else:
            raise ValueError(f"a field has the unsupported wire type {tag & 7}")
        yield tag >> 3, value


def _varints(message: bytes) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
