"""Configurations as frozen dataclasses: JSON in, JSON out, every mistake named at construction."""

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from imagen_jax.errors import UserError

T = TypeVar("T")


class Config:
    """What the configurations share. A subclass calls `_check_types` when constructed."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, as in JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
        """Raises UserError naming an unknown key (with the closest match) or a missing field."""
        if not isinstance(data, Mapping):
            raise UserError(f"{cls.__name__} must be a mapping of its fields, got {data!r}.")
        fields = dataclasses.fields(cls)
        _check_keys(cls.__name__, data, [field.name for field in fields])
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in data:
                raise UserError(f"{cls.__name__} needs the field {field.name!r}.")
        return cls(**{name: _freeze(value) for name, value in data.items()})

    def _check_types(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            value = _freeze(getattr(self, field.name))
            if not _fits(value, hints[field.name]):
                raise UserError(
                    f"{type(self).__name__}.{field.name} must be {_spell(hints[field.name])}, "
                    f"got {value!r} ({type(value).__name__})."
                )
            object.__setattr__(self, field.name, value)


def _check_keys(where: str, data: Mapping[str, Any], known: list[str]) -> None:
    """Raises ValueError for the first key of `data` that is not `known`."""
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(f"{where} has no field {key!r}{hint}")


_hints = functools.cache(typing.get_type_hints)
"""The type hints of a class; computing them takes longer than all checks together."""


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, (list, tuple)) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data has the type of an annotation. An int is accepted as a float; inf and NaN
    are not."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args and type(value) in {type(arg) for arg in args}
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(_fits, value, args))
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_PLAIN = {
    int: "an int",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
    type(None): "null",
}


def _spell(hint: Any) -> str:
    """An annotation in words: `one of 'cosine', 'linear' or a tuple of these`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        many = {tuple[arg, ...] for arg in args}
        return " or ".join("a tuple of these" if arg in many else _spell(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        if args[-1] is not Ellipsis:
            return f"({', '.join(map(_spell, args))})"
        return f"a tuple of {_spell(args[0])}"
    return _PLAIN.get(hint) or f"a {hint.__name__}"


def _named(value: Any) -> str:
    """A value, or the name of its class if it is a dataclass."""
    return type(value).__name__ if dataclasses.is_dataclass(value) else repr(value)


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """The first difference of two configurations, e.g. `unets.0.dim is 64 there, 32 here`."""
    if dataclasses.is_dataclass(there) and type(there) is type(here):
        pairs = [
            (field.name, getattr(there, field.name), getattr(here, field.name))
            for field in dataclasses.fields(there)
        ]
    elif isinstance(there, tuple) and isinstance(here, tuple) and len(there) == len(here):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(there, here, strict=True))]
    elif isinstance(there, tuple) and isinstance(here, tuple):
        return f"{name} has {len(there)} entries there, {len(here)} here"
    else:
        return None if there == here else f"{name} is {_named(there)} there, {_named(here)} here"
    for part, a, b in pairs:
        found = first_difference(a, b, f"{name}.{part}".lstrip("."))
        if found:
            return found
    return None
