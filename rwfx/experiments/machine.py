"""The conditions of a measurement: what it ran on, with which versions, and by which command."""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def conditions(device: torch.device | str = "cpu") -> dict[str, str]:
    """Describe this process's machine, software and command, for the file that holds a measurement."""
    found = {"hardware": f"{_processor()}, {os.cpu_count()} cores"}
    if torch.device(device).type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found | {
        "threads": f"{torch.get_num_threads()} ({torch.backends.cpu.get_cpu_capability()})",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}, rwfx {_version()}",
        "system": platform.platform(terse=True),
        "command": _command(),
    }


def load() -> dict[str, str]:
    """Say how busy the machine is, where the system tells."""
    if not hasattr(os, "getloadavg"):
        return {}
    return {"load": f"{', '.join(f'{of:.2f}' for of in os.getloadavg())} (of the last 1, 5 and 15 minutes, at the end)"}


def cuda_conditions(device: torch.device | str) -> dict[str, str]:
    """Describe how exact a CUDA device's products are, or say that none was measured."""
    if torch.device(device).type != "cuda":
        there = "a CUDA device is there, and was not asked for" if torch.cuda.is_available() else "no CUDA device here"
        return {"CUDA": f"not measured ({there})"}
    matmul = torch.backends.cuda.matmul
    return {
        "CUDA": f"{torch.version.cuda}, times by device events",
        "TF32": f"in float32 products {_allowed(matmul.allow_tf32)} "
        f"(float32 matmul precision {torch.get_float32_matmul_precision()!r})",
        "bfloat16": f"sums of products in reduced precision {_allowed(matmul.allow_bf16_reduced_precision_reduction)}",
    }


def check_device(device: torch.device | str) -> None:
    """Refuse a device that cannot be used.

    Raises:
        ValueError: with torch's own reason.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error


def as_markdown(found: dict[str, str]) -> str:
    """Give the conditions as a list, one a line."""
    return "\n".join(
        f"- {name}: `{value}`" if name == "command" else f"- {name}: {value}" for name, value in found.items()
    )


def _allowed(flag: bool | str) -> str:
    return "allowed" if flag else "not allowed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version() -> str:
    try:
        return version("rwfx")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


def _command() -> str:
    """Give the command as it was typed, with ``python -m`` for a package that was run as one."""
    program = Path(sys.argv[0])
    start = (
        ["python", "-m", f"rwfx.{program.parent.name}"] if program.name == "__main__.py" else ["python", sys.argv[0]]
    )
    return shlex.join([*start, *sys.argv[1:]])
