"""Modules of a class derived from their own, made for one model: copied and pickled by the class they came from."""

import functools
import types
from typing import Any, TypeVar

from torch import nn


class Derived(nn.Module):
    """A mixin: ``derive`` puts it before the class of a module that is there."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep it from the model's classes, where one may register its subclasses or ask more of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        mixin, kind = type(self).__bases__
        return _blank, (mixin, kind), self.__getstate__()


Kind = TypeVar("Kind", bound=Derived)


def derive(mixin: type[Kind], module: nn.Module) -> Kind:
    """Give ``module`` the class ``mixin`` in front of its own, in place."""
    module.__class__ = _derived(mixin, type(module))
    return module  # type: ignore[return-value]


@functools.cache
def _derived(mixin: type[Derived], kind: type[nn.Module]) -> type[nn.Module]:
    """The class ``mixin`` before ``kind``, under the name of ``kind`` and with the signature of its forward."""
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    # Dynamo keeps its compiled code by code object: each class needs one of its own.
    forward.__code__ = forward.__code__.replace()
    functools.update_wrapper(forward, kind.forward)
    return types.new_class(kind.__name__, (mixin, kind), exec_body=lambda body: body.update(names, forward=forward))


def _blank(mixin: type[Derived], kind: type[nn.Module]) -> nn.Module:
    made = _derived(mixin, kind)
    return made.__new__(made)
