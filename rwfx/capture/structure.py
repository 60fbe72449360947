"""Nested values: tensors inside of tuples, lists, dicts, named tuples and dataclasses.

``leaves_of`` takes them apart, ``rebuilt`` puts other leaves in their places. What is not one of these is a leaf.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class Access(NamedTuple):
    """One step into a nested value: ``value[key]``, or ``value.key``."""

    key: Any
    is_attribute: bool

    def __str__(self) -> str:
        return f".{self.key}" if self.is_attribute else f"[{self.key!r}]"


def parts_of(value: Any) -> list[tuple[Access, Any]] | None:
    """The parts of a container, in order; None for a leaf."""
    if _is_dataclass(value):
        return [(Access(f.name, True), getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    if _is_named_tuple(value):
        return [(Access(name, True), getattr(value, name)) for name in value._fields]
    if type(value) in (tuple, list):
        return [(Access(k, False), part) for k, part in enumerate(value)]
    if type(value) in (dict, OrderedDict):
        return [(Access(key, False), part) for key, part in value.items()]
    return None


def leaves_of(value: Any, path: tuple[Access, ...] = ()) -> Iterator[tuple[tuple[Access, ...], Any]]:
    """The leaves with the way to each."""
    parts = parts_of(value)
    if parts is None:
        yield path, value
    else:
        for access, part in parts:
            yield from leaves_of(part, (*path, access))


def rebuilt(value: Any, leaves: Iterable[Any], call: Callable[..., Any] = lambda kind, *a, **k: kind(*a, **k)) -> Any:
    """A value of the same structure with other leaves, given in order.

    ``call(kind, ...)`` makes a container that is no plain tuple, list or dict.
    """
    return _rebuilt(value, iter(leaves), call)


def _rebuilt(value: Any, leaves: Iterator[Any], call: Callable[..., Any]) -> Any:
    parts = parts_of(value)
    if parts is None:
        return next(leaves)
    made = [_rebuilt(part, leaves, call) for _, part in parts]
    keys = [access.key for access, _ in parts]
    if _is_dataclass(value):
        return call(type(value), **dict(zip(keys, made, strict=True)))
    if _is_named_tuple(value):
        return call(type(value), *made)
    if type(value) is OrderedDict:
        return call(OrderedDict, list(zip(keys, made, strict=True)))
    return dict(zip(keys, made, strict=True)) if type(value) is dict else type(value)(made)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
