"""Packages that only the experiments need, imported where they are used."""

import importlib
from typing import Any


def require(name: str) -> Any:
    """Import the module ``name``, or say which extra brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f'the experiments need {package}, which is not installed: pip install "rwfx[experiments]"'
        ) from error
