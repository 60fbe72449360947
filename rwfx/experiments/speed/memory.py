"""Memory: what a few steps take on top of the network, and the bytes of what they keep.

In: a ``Plan``. Out: a ``Memory`` per contender, each measured in a process of its own, and ``memory.csv``.

The *peak* is that of the whole process over ``STEPS`` steps, minus the level before them. That level is taken when
everything is imported, the network is built and compiled, and one forward and backward has been made and its
gradients dropped. On a CUDA device it is that of torch's allocator.
"""

import gc
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from rwfx.experiments.fresh import call_fresh
from rwfx.experiments.speed.contenders import batch_loss, build, train_step
from rwfx.experiments.speed.plan import Plan, Size
from rwfx.experiments.speed.turns import Call
from rwfx.experiments.tables import markdown, write_csv
from rwfx.passes.sample_rows import SAMPLER

STEPS = 3
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Memory:
    """The memory of one contender, in bytes."""

    size: str
    batch_size: int
    num_paths: int | None
    contender: str
    compiled: bool
    peak: int
    gradients: int
    optimizer_state: int
    saved: int
    sampler: int


COLUMNS = {
    "peak": f"of the whole process over {STEPS} steps, above its level with the network built and compiled (on a CPU "
    "the greatest resident size, while glibc gives every freed block of 64 kB or more back at once)",
    "gradients": "after a backward; of row gradients the indices and the values",
    "optimizer state": "after the last step",
    "saved activations": "what autograd keeps of a forward for its backward, without the parameters, with the batch",
    "sampler": "the row sampler's tables; they are there before the steps, so the peak is without them",
}


def run(plan: Plan, progress: bool) -> str:
    """Measure every contender of every size, write ``memory.csv`` and give the table."""
    found = []
    cases = [(size, *case) for size in plan.sizes for case in _contenders(plan, size)]
    with tqdm(total=len(cases), desc="memory", unit="process", disable=not progress) as bar:
        for size, kind, num_paths, compiled in cases:
            bar.set_description(f"memory: {size.name}, {kind}{' compiled' * compiled}")
            # Freed blocks go back to the system at once: else what was freed before the level would hide in it.
            environment = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
            found.append(call_fresh(measure, plan, size, kind, num_paths, compiled, **environment))
            write_csv(plan.out / "memory.csv", Memory, found)
            bar.update()
    return table(found)


def check_memory(plan: Plan) -> None:
    """Refuse a system that does not tell the peak of a process.

    Raises:
        ValueError: says how to leave this part out.
    """
    if torch.device(plan.device).type == "cpu" and not (sys.platform == "linux" and "VmHWM" in _status()):
        raise ValueError(
            "the part memory reads the peak of a process from /proc/self/status, as Linux has it, and it is not there. "
            "Leave memory out of --only."
        )


def _contenders(plan: Plan, size: Size) -> list[tuple[str, int | None, bool]]:
    how = (False, True) if plan.compiled else (False,)
    kinds = ("masked", "sparse") if plan.masked else ("sparse",)
    cases: list[tuple[str, int | None]] = [("dense", None)]
    cases += [(kind, num_paths) for num_paths in size.num_paths for kind in kinds]
    return [(*case, compiled) for case in cases for compiled in how]


def measure(plan: Plan, size: Size, kind: str, num_paths: int | None, compiled: bool) -> Memory:
    """Measure one contender; to be called in a process of its own."""
    network, optimizer = build(plan, size, kind, num_paths)
    stepped = torch.compile(network, fullgraph=True) if compiled else network
    loss = batch_loss(plan, size, stepped)
    loss().backward()
    optimizer.zero_grad()
    gc.collect()
    peak = peak_of(train_step(loss, optimizer), plan.device)
    return Memory(
        size.name,
        size.batch_size,
        num_paths,
        kind,
        compiled,
        peak,
        gradients=gradient_bytes(network),
        optimizer_state=state_bytes(optimizer),
        saved=saved_bytes(network, loss),
        sampler=0 if kind == "dense" else sum(x.nbytes for x in network.get_submodule(SAMPLER).buffers()),
    )


def peak_of(step: Call, device: str) -> int:
    """The bytes that ``STEPS`` steps take at their peak, above the level before."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
    else:
        # ru_maxrss would not do: a process begins with the peak of the one that started it.
        (PROC / "clear_refs").write_text("5")
        level = _status()["VmRSS"]
    for _ in range(STEPS):
        step()
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) - level
    return _status()["VmHWM"] - level


def _status() -> dict[str, int]:
    """The lines of ``/proc/self/status`` that are sizes, in bytes."""
    lines = (line.split() for line in (PROC / "status").read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}


def gradient_bytes(network: nn.Module) -> int:
    """The bytes of the gradients that are there: of sparse ones the indices and the values."""
    found: list[Tensor] = []
    for parameter in network.parameters():
        gradient = parameter.grad
        if gradient is not None:
            found += [gradient._indices(), gradient._values()] if gradient.is_sparse else [gradient]
    return _bytes(found)


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of the tensors in the optimizer's state."""
    return _bytes(leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))


def saved_bytes(network: nn.Module, loss: Call) -> int:
    """The bytes that autograd keeps of a forward, each storage once, without those of the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = loss()  # held on to, so that no storage is freed and its address used again
    del graph
    return sum(size for address, size in kept.items() if address not in parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def table(found: Sequence[Memory]) -> str:
    """Give a Markdown table in megabytes (10^6 bytes); in brackets the share of the same size's eager dense step."""
    dense = {(one.size, one.batch_size): one for one in found if one.contender == "dense" and not one.compiled}
    cells = []
    for one in found:
        other = dense[one.size, one.batch_size]
        bytes_ = [
            (one.peak, other.peak),
            (one.gradients, other.gradients),
            (one.optimizer_state, other.optimizer_state),
            (one.saved, other.saved),
        ]
        how = f"{one.contender}, {'compiled' if one.compiled else 'eager'}"
        shares = [_megabytes(own) + (f" ({own / of:.0%})" if of and one is not other else "") for own, of in bytes_]
        cells.append([one.size, str(one.batch_size), str(one.num_paths or ""), how, *shares, _megabytes(one.sampler)])
    legend = "\n".join(f"- *{name}*: {meaning}." for name, meaning in COLUMNS.items())
    intro = "Megabytes (10^6 bytes); in brackets the share of the eager dense step's."
    return f"{markdown(['MLP', 'batch', 'paths', 'step', *COLUMNS], cells)}\n\n{intro}\n\n{legend}"


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.2f}"
