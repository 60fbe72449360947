"""Register an autograd function as an operator: on every device, without gradients, and in autocast."""

import torch


def register(library: torch.library.Library, name: str, function: type[torch.autograd.Function]) -> None:
    """Make ``function`` the implementation of ``rwfx::name``, which ``library`` has defined.

    Autocast hands its type to the operator, as the argument ``dtype``, instead of casting what it is given: so a
    weight's gradient is cast on its rows alone. Double precision it leaves alone. An operator without that argument is
    called as it is.
    """
    op = getattr(torch.ops.rwfx, name).default

    def without_gradient(*arguments):
        with torch.no_grad():
            return function.apply(*arguments)

    library.impl(name, function.apply, "Autograd")
    library.impl(name, without_gradient, "CompositeExplicitAutograd")
    if all(argument.name != "dtype" for argument in op._schema.arguments):
        return
    for device, key in {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}.items():
        library.impl(name, _in_autocast(op, device), key)


def _in_autocast(op, device: str):
    defaults = [argument.default_value for argument in op._schema.arguments]
    place = [argument.name for argument in op._schema.arguments].index("dtype")

    def kernel(x, *others):
        given = [x, *others, *defaults[1 + len(others) : place + 1]]  # those at their default may not be passed
        given[place] = None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            return op(*given)

    return kernel
