"""What can be done with the records of any source: captions from a template, selection by columns,
and mixtures of several sources."""

import dataclasses
import operator
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from imagen_jax.data.records import NoCaption, Record, Source
from imagen_jax.errors import UserError

OPERATORS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq,
    "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*([\w./ -]+?)\s*(>=|<=|==|!=|>|<)\s*(\S.*?)\s*")
MEASURED = ("width", "height", "caption_length")


def with_template(source: Source, template: str) -> Source:
    """The source with captions made from columns, such as "a photo of a {label}"."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"--template {template!r}: {error}") from error
    if not names or not all(names):
        raise UserError(
            f"--template {template!r} must name a column, as in 'a photo of a {{label}}'"
        )
    return dataclasses.replace(source, read=_Templated(source.read, template, tuple(names)))


@dataclass(frozen=True)
class _Templated:
    read: Callable[[int], Record]
    template: str
    names: tuple[str, ...]

    def __call__(self, i: int) -> Record:
        record = self.read(i)
        try:
            (caption,) = self.captions(i)
        except NoCaption:
            caption = None
        return record._replace(caption=caption, more=())

    def captions(self, i: int) -> tuple[str, ...]:
        columns = self.columns(i)
        values = {}
        for name in self.names:
            text = "" if columns.get(name) is None else _text(columns[name])
            if not text:
                has = "" if name in columns else f", only {', '.join(columns) or 'no columns'}"
                raise NoCaption(f"no {name!r} for its caption{has}")
            values[name] = text.replace("_", " ")
        return (self.template.format_map(values),)

    def columns(self, i: int) -> Mapping[str, Any]:
        return self.read.columns(i) if hasattr(self.read, "columns") else {}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@dataclass(frozen=True)
class Condition:
    """`width >= 256`: a column, an operator and a number or a word."""

    column: str
    operator: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise UserError(f"--where {text!r}: write COLUMN >= VALUE (or <=, ==, !=, >, <)")
        column, sign, value = match.groups()
        number = _number(value)
        if re.search("[<>=]", value):
            raise UserError(
                f"--where {text!r}: give each condition as a separate argument, as in --where "
                "'width >= 256' 'height >= 256'"
            )
        if number is None and column in MEASURED:
            raise UserError(f"--where {text!r}: {value!r} is not a number")
        return cls(column, sign, value if number is None else number)

    def holds(self, value: Any) -> bool:
        """Whether a value meets it; not if it is missing, or not a number but has to be one."""
        if value is not None:
            value = _number(value) if isinstance(self.value, float) else _text(value)
        return value is not None and OPERATORS[self.operator](value, self.value)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def where(source: Source, conditions: Sequence[str]) -> Source:
    """The records that meet all conditions. These are about columns, or about "width" and "height"
    in pixels and "caption_length" in characters, which are measured if no column has that name.

    A record whose columns cannot be read is kept, and found to be damaged later. Raises UserError
    if no record has one of the columns, and if no records remain.
    """
    parsed = [Condition.parse(text) for text in conditions]
    kept = np.zeros(len(source), bool)
    known: set[str] = set()
    for i in range(len(source)):
        try:
            values = _Columns(source, i)
            known |= {one.column for one in parsed if values.get(one.column) is not None}
            kept[i] = all(one.holds(values.get(one.column)) for one in parsed)
        except UserError:
            kept[i] = True
    if missing := sorted({one.column for one in parsed} - known):
        columns = ", ".join([*source.columns(0), *MEASURED]) if len(source) else "none"
        raise UserError(
            f"--where: no record has a column {missing[0]!r}; the columns are {columns}"
        )
    text = " and ".join(conditions)
    if not kept.any():
        raise UserError(f"{source.name}: none of {len(source)} records has {text}")
    note = f"{source.name}: {kept.sum():,} of {len(source):,} records have {text}"
    return dataclasses.replace(source, rows=source.rows[kept], notes=(*source.notes, note))


class _Columns:
    """The columns of a record, including those that have to be measured."""

    def __init__(self, source: Source, i: int):
        self.source, self.i, self.columns = source, i, source.columns(i)

    def get(self, name: str) -> Any:
        if name in self.columns or name not in MEASURED:
            return self.columns.get(name)
        if name == "caption_length":
            return min(map(len, self.source.captions(self.i)))
        height, width = self.source.size(self.i)
        return width if name == "width" else height


def mixture(sources: Sequence[Source], weights: Sequence[float]) -> Source:
    """Several sources as one; `weights` give their shares of a batch.

    Each source repeats its own records in its own order: a small one is repeated more often. What
    is held out of each stays held out. Raises UserError for weights that are not positive, and if
    only some of the sources have embeddings.
    """
    if len(sources) > 255:
        raise UserError(f"--data: at most 255 sources, got {len(sources)}")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"--data: weights must be positive, got {', '.join(map(str, weights))}")
    if len({source.has_embeds for source in sources}) > 1:
        raise UserError(
            "--data: only some of these sources have stored embeddings; all or none must"
        )
    sizes = [len(source.keys) for source in sources]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    names = [f"{i}:{source.name}" for i, source in enumerate(sources)]
    read = _Mixed(tuple(source.read for source in sources), starts)
    total = sum(weights)
    return Source(
        name=" + ".join(f"{w / total:.0%} {s.name}" for s, w in zip(sources, weights, strict=True)),
        keys=_MixedKeys(tuple(source.keys for source in sources), starts, tuple(names)),
        read=read,
        heldout=np.concatenate([source.heldout for source in sources]),
        rows=np.concatenate([s.rows + a for s, a in zip(sources, starts, strict=False)]),
        hashes=np.concatenate([source.hashes for source in sources]),
        has_embeds=sources[0].has_embeds,
        left_out={
            f"{name}: {key}": why
            for name, source in zip(names, sources, strict=True)
            for key, why in source.left_out.items()
        },
        notes=tuple(note for source in sources for note in source.notes),
        weights=tuple(weight / total for weight in weights),
        parts=np.repeat(np.arange(len(sources), dtype=np.uint8), sizes),
    )


def _part(starts: np.ndarray, i: int) -> tuple[int, int]:
    """Which source record i belongs to, and its number there."""
    part = int(np.searchsorted(starts, i, side="right")) - 1
    return part, int(i - starts[part])


@dataclass(frozen=True)
class _Mixed:
    reads: tuple[Callable[[int], Record], ...]
    starts: np.ndarray

    def __call__(self, i: int) -> Record:
        part, own = _part(self.starts, i)
        return self.reads[part](own)

    def captions(self, i: int) -> tuple[str, ...]:
        part, own = _part(self.starts, i)
        read = self.reads[part]
        return read.captions(own) if hasattr(read, "captions") else read(own).captions

    def columns(self, i: int) -> Mapping[str, Any]:
        part, own = _part(self.starts, i)
        return self.reads[part].columns(own) if hasattr(self.reads[part], "columns") else {}


class _MixedKeys(Sequence[str]):
    def __init__(self, keys: tuple[Sequence[str], ...], starts: np.ndarray, names: tuple[str, ...]):
        self.keys, self.starts, self.names = keys, starts, names

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, i: SupportsIndex) -> str:
        part, own = _part(self.starts, range(len(self))[i])
        return f"{self.names[part]}/{self.keys[part][own]}"

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
