"""Calls in a Python process of their own: nothing compiled, nothing cached, and a peak of memory that is theirs."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
ROOT = Path(__file__).parents[2]
"""Where this very package is found."""


def call_fresh(function: Callable[..., Result], *arguments: Any, **environment: str) -> Result:
    """Call a function of a module in a new process, with this one's number of threads.

    Args:
        function: found by its name, as pickle does.    arguments: what can be pickled.
        environment: variables of the new process. ``TORCHINDUCTOR_CACHE_DIR`` is an empty folder in any case.

    Raises:
        ChildProcessError: the process failed; with the last line that it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, result = (Path(folder) / name for name in ("call", "result"))
        call.write_bytes(pickle.dumps((torch.get_num_threads(), function, arguments)))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"), **environment}
        command = [sys.executable, "-P", "-m", __name__, str(call), str(result)]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ChildProcessError(f"{function.__name__} failed in its process (status {done.returncode}): {said}")
        return pickle.loads(result.read_bytes())


def _answer(call: str, result: str) -> None:
    threads, function, arguments = pickle.loads(Path(call).read_bytes())
    torch.set_num_threads(threads)
    Path(result).write_bytes(pickle.dumps(function(*arguments)))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
