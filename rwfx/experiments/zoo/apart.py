"""Calls in a child process each, that may take too long or die: nothing of theirs is left, and this process goes on.

The children are forks of a server that has imported what they need, as importing takes longer than most of the calls.
"""

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

IMPORTED = ("rwfx", "torch._dynamo", "torchvision", "timm", "transformers")


class Lost(Exception):
    """A child ended without an answer, or was ended."""


def call_apart(function: Callable[..., Result], *arguments: Any, limit: float) -> Result:
    """Call a function of a module in a child process, with this one's number of threads.

    Args:
        function, arguments: as pickle takes them.    limit: the seconds after which the child is ended.

    Raises:
        Lost: it was ended, or it died; says by what.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, torch.get_num_threads(), function, arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            raise Lost(f"it took longer than {limit:g} seconds")
        answer = ours.recv()
        child.join(1)  # it puts its own things away
        return answer
    except EOFError:
        child.join()
        raise Lost(f"its process died with status {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
        ours.close()


def _answer(telling: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # they would run through the progress bar
    torch.set_num_threads(threads)
    telling.send(function(*arguments))


def _end_with_parent() -> None:
    """End this process when the one that asked for it has ended, as where it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
