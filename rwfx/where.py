"""Where a model is made sparse: which of its weights are asked for.

In: what ``transform(include=..., exclude=...)`` was given. A weight is asked for by

    a pattern     of its name or of a module's that it lies in, with ``*`` and ``?`` (``"encoder.*"``, ``"fc1"``)
    a role        ``"head"``, ``"mlp"``, ``"attention"`` (``rwfx.roles``), or ``"all"``
    a class       of a module that it lies in (``nn.Conv2d``)
    a function    ``(name, module) -> bool``, of the weight's name and of the module that holds it
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rwfx.roles import ROLES

Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""One thing that asks for weights."""


def given_places(argument: str, given: Any) -> tuple[Where, ...]:
    """What was given to ``argument``, one or several, as a tuple.

    Raises:
        TypeError: one is no pattern, class of modules or function.
    """
    one = isinstance(given, str | type) or callable(given)
    places: tuple[Any, ...] = (given,) if one or not isinstance(given, Iterable) else tuple(given)
    for place in places:
        if isinstance(place, type) and not issubclass(place, nn.Module):
            raise TypeError(f"{argument} holds the class {place.__name__}, which is no class of modules.")
        if not (isinstance(place, str) or callable(place)):
            raise TypeError(
                f"{argument} must hold names of weights or modules (with * and ?), roles ({', '.join(ROLES)}), classes "
                f"of modules or functions of a name and a module, got {place!r}."
            )
    return places


def asked_for(
    argument: str,
    places: Iterable[Where],
    weights: Mapping[str, Collection[str]],
    host: nn.Module,
    roles: Mapping[str, Collection[str]],
) -> set[str]:
    """Those of ``weights``, each given with all its names, that one of ``places`` asks for.

    Raises:
        ValueError: a place asks for none of them, so that it is probably misspelt.
    """
    found: set[str] = set()
    for place in places:
        wanted = {weight for weight, names in weights.items() if asks(place, weight, names, host, roles)}
        if not wanted and not (isinstance(place, str) and place in ROLES):
            known = ", ".join(weights)
            shown = place if isinstance(place, str) else getattr(place, "__name__", place)
            raise ValueError(f"{argument} names {shown!r}, which matches no weight or module; the weights are {known}.")
        found |= wanted
    return found


def matches(names: Collection[str], pattern: str) -> bool:
    """Whether a weight of these names, or a module that it lies in, has a name like ``pattern``."""
    return any(path == pattern or fnmatchcase(path, pattern) for name in names for path in _paths(name))


def asks(
    place: Where, weight: str, names: Collection[str], host: nn.Module, roles: Mapping[str, Collection[str]]
) -> bool:
    """Whether ``place`` asks for a weight of these names."""
    if place == "all":
        return True
    if isinstance(place, str):
        return weight in roles.get(place, ()) or matches(names, place)
    if isinstance(place, type):
        around = {path for name in names for path in (*_modules(name), "")}
        return any(isinstance(host.get_submodule(path), place) for path in around)
    return any(bool(place(name, host.get_submodule(name.rpartition(".")[0]))) for name in names)


def _paths(weight: str) -> list[str]:
    """A weight's name, that of its parameter, of which it may be a part (``"in_proj_weight[0:64]"``), and those of all
    modules that it lies in, the innermost first."""
    parameter = weight.partition("[")[0]
    return list(dict.fromkeys([weight, parameter, *_modules(weight)]))


def _modules(weight: str) -> list[str]:
    parts = weight.partition("[")[0].split(".")[:-1]
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]
