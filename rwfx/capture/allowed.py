"""Which models are refused before any route is tried, and with what remedy."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
# What lies there and is float: it holds the place of what quantisation will put there.
FLOAT = ("FloatFunctional", "FXFloatFunctional")


def check_model(model: Any) -> None:
    """Refuse what no route can capture.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: it is compiled, wrapped, scripted, lazy, quantised or replaced; says what to give in its place.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {name}.")
    for path, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            what = f"module {path!r} of the model" if path else "model"
            raise ValueError(f"{what} is compiled. Transform the model first, then compile what comes out of it.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"model is wrapped in {name}. Transform model.module first, then wrap what comes out of it.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model is a ScriptModule, which torch.fx cannot trace. Give the nn.Module it was made from.")
    if "forward" in vars(model):
        raise ValueError(f"forward of this {name} has been replaced on the instance, where torch.fx does not see it.")
    for path, module in model.named_modules():
        kind = type(module)
        is_float = kind.__name__ in FLOAT or not kind.__module__.startswith(QUANTISED)
        if not is_float or hasattr(module, "_packed_params"):
            raise ValueError(
                f"module {path!r} is quantised ({kind.__module__}.{kind.__name__}): its weight is packed and has no "
                "gradient. Transform the float model, and quantise it after training."
            )
    lazy = [path for path, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"parameter {lazy[0]!r} is lazy and has no shape yet. Run the model once on a batch first.")
