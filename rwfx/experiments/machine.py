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


def as_markdown(found: dict[str, str]) -> str:
    """Give the conditions as a list, one a line."""
    return "\n".join(
        f"- {name}: `{value}`" if name == "command" else f"- {name}: {value}" for name, value in found.items()
    )


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
