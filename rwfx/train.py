"""Train a model with row-sparse, masked, always-sparse or plain dense steps, and record what each step cost.

In: a model and a loader of batches ``(input, ..., target)``. Out: the model, trained in place, and its
``History``.

``rw_sparse`` trains ``rwfx.transform(model, mode="sparse", grad="rows")`` and ``rw_masked`` the same with
``mode="masked"``, both with ``rwfx.optim``; ``full`` trains the model as it is with ``torch.optim``, and
``always_sparse`` what ``rwfx.sparsify(model)`` makes, with a ``rwfx.Topology``; all fused.
"""

import copy
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

import rwfx.optim
from rwfx import checkpoint as checkpoints
from rwfx.checkpoint import (
    Checkpoint,
    loader_generators,
    random_state,
    random_state_kept,
    restore_random_state,
)
from rwfx.cost import dense_flops, updated_scalars
from rwfx.history import History, Record
from rwfx.sparsified import SparsifiedModule
from rwfx.sparsify import sparsify
from rwfx.topology import Topology
from rwfx.transform import transform
from rwfx.transformed import Transformed

MODES = {"rw_sparse": "sparse", "rw_masked": "masked", "always_sparse": None, "full": None}
"""The trainer's modes, and the ``mode`` of ``rwfx.transform`` that each one trains with, if it does."""

IGNORED = -100
"""The target that ``F.cross_entropy`` leaves out."""

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
"""The optimizers that go by a name, in ``rwfx.optim`` and ``torch.optim`` alike."""


class RandomWalkTrainer:
    """Trains ``model`` on the rows that random walks visit, or densely, to compare with.

    Attributes:
        model: the given model; its parameters are the ones that are trained, but in mode ``"always_sparse"``.
        network: the module that is stepped: what ``rwfx.transform`` made (with its ``rows`` and ``report``), what
            ``rwfx.sparsify`` made, with parameters of its own, or the model itself in mode ``"full"``.
        topology: what moves the connections in mode ``"always_sparse"``; None in others.
        optimizer: the optimizer of the model's trainable parameters.
        history: what the steps so far have done.

    Args:
        model: any model that ``rwfx.transform`` takes; in mode ``"full"``, any model.
        mode: a key of ``MODES``.
        num_paths: walks a step, by default as in ``rwfx.transform``; other modes have none. Other row policies are
            among the options of ``rwfx.transform``: ``rows=rwfx.TopK(0.1)``.
        optimizer: a key of ``OPTIMIZERS``, or a function from the list of parameters to an ``Optimizer`` (one
            that takes row gradients, unless the mode is ``"full"`` or ``grad="dense"`` is among the options).
        lr: the learning rate of an optimizer given by name.
        loss_fn: ``loss_fn(network(*inputs), target)`` is the scalar that is minimised.
        epochs: passes over the loader in a ``fit``.
        device: where to train; the model is moved there. By default it stays where its parameters are.
        compile: step through ``torch.compile``; the first step's seconds then include the compilation.
        seed: of the row sampler's own stream, or of the sparse weights and their topology. Everything else (dropout,
            shuffling) follows the global generators and the loader's, which the trainer never seeds.
        checkpoint: a file to write the run to, so that it can be resumed.
        checkpoint_every: steps between two checkpoints, besides the one at the end; by default one an epoch.
        eval_every: steps between two evaluations, besides the one at the end; by default one an epoch.
        progress: show a progress bar.
        topology: arguments of ``rwfx.Topology`` in mode ``"always_sparse"``: ``{"interval": 100, "end": 3000}``.
        transform_options: further arguments of ``rwfx.transform``, in mode ``"always_sparse"`` of ``rwfx.sparsify``.

    Raises:
        ValueError: an argument is outside what is allowed, or the model has nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "rw_sparse",
        num_paths: int | None = None,
        *,
        optimizer: str | Callable[[list[nn.Parameter]], Optimizer] = "adam",
        lr: float = 1e-3,
        loss_fn: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
        epochs: int = 1,
        device: torch.device | str | None = None,
        compile: bool = False,
        seed: int | None = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        eval_every: int | None = None,
        progress: bool = True,
        topology: Mapping[str, Any] | None = None,
        **transform_options: Any,
    ) -> None:
        _check_choice("mode", mode, MODES)
        _check_counts(epochs=epochs)
        _check_counts(optional=True, num_paths=num_paths, checkpoint_every=checkpoint_every, eval_every=eval_every)
        if isinstance(optimizer, str) or not callable(optimizer):
            _check_choice("optimizer", optimizer, OPTIMIZERS, "or a function from parameters to an Optimizer")
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, given {type(model).__name__}.")
        if checkpoint_every is not None and checkpoint is None:
            raise ValueError(f"checkpoint_every={checkpoint_every} needs a file: give checkpoint=PATH.")
        if mode == "full" and transform_options:
            raise ValueError(f"mode 'full' transforms nothing, so it takes no {sorted(transform_options)}.")
        if mode != "always_sparse" and topology is not None:
            raise ValueError(f"mode {mode!r} moves no connections, so it takes no topology={topology!r}.")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to train.")

        self.model = model.to(device) if device is not None else model
        self.device = parameters[0].device
        self.mode = mode
        self.network, namesakes = self.model, torch.optim
        if (how := MODES[mode]) is not None:
            options = {"grad": "rows", **transform_options}
            self.network = sparse_model = transform(self.model, num_paths, mode=how, seed=seed, **options)
            namesakes = rwfx.optim
        elif mode == "always_sparse":
            self.network = sparsify(self.model, seed=seed, **transform_options)
            parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
            self.device = parameters[0].device  # a model on the meta device has been given numbers
        if isinstance(optimizer, str):
            self.optimizer = getattr(namesakes, OPTIMIZERS[optimizer])(parameters, lr=lr, fused=True)
        else:
            self.optimizer = optimizer(parameters)
        self.topology = None
        if mode == "always_sparse":
            self.topology = Topology(self.network, self.optimizer, **{"seed": seed, **(topology or {})})
        self.history = History()
        self.loss_fn = loss_fn
        self.epochs = epochs
        self.progress = progress
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self.eval_every = eval_every
        self._settings = {"mode": mode, "lr": float(lr)}
        if how is not None:
            policy = sparse_model.settings["rows"]
            self._settings |= {"rows": _worded(policy), "seed": seed, **_described(transform_options)}
        elif self.topology is not None:
            self._settings |= {name: _worded(value) for name, value in self.topology.settings.items()}
            self._settings |= {"weights": _worded(self.network.settings)}
        self._stepped = torch.compile(self.network) if compile else self.network
        self._parameters = parameters
        self._dense_flops: dict[tuple[torch.Size, ...], tuple[int, int]] = {}

    def fit(self, train_loader: Iterable, test_loader: Iterable | None = None, resume: bool = False) -> History:
        """Train for ``epochs`` passes over ``train_loader`` and give the history of all steps so far.

        See ``steps`` for the arguments and what is raised.
        """
        done = len(self.history)
        records = self.steps(train_loader, test_loader, resume)
        length = _length(train_loader)
        with tqdm(
            total=None if length is None else self.epochs * length,
            initial=len(self.history) - done,
            desc=self.mode,
            unit="step",
            disable=not self.progress,
        ) as bar:
            shown = {}
            for record in records:
                shown["loss"] = f"{record.loss:.4f}"
                if record.test_accuracy is not None:
                    shown["test accuracy"] = f"{record.test_accuracy:.4f}"
                bar.set_postfix(shown, refresh=False)
                bar.update()
        return self.history

    def steps(
        self, train_loader: Iterable, test_loader: Iterable | None = None, resume: bool = False
    ) -> Iterator[Record]:
        """Train step by step: a record after each, so that several runs can take turns in one process.

        Args:
            train_loader: an iterable of batches ``(input, ..., target)`` that can be gone through once an
                epoch. Its ``generator``, its sampler's and its batch sampler's are part of a checkpoint; an
                order of batches that comes from anything else must be the same at every pass.
            test_loader: batches to measure the accuracy on, the largest output being the answer. The random
                streams are left as they were, so a run is the same with and without it.
            resume: go on from the checkpoint file; from the beginning where there is none yet. The random
                streams of torch, numpy and ``random`` are then put back to where they were as well.

        Raises:
            ValueError: the checkpoint file exists and ``resume`` is not asked for (nothing is overwritten by
                accident), it is damaged, or it belongs to a run of another configuration; nothing has changed
                then. While training: a batch is not a sequence of tensors, or an epoch has no batches.
        """
        if resume and self.checkpoint is None:
            raise ValueError("resume=True needs the file to go on from: give checkpoint=PATH.")
        if self.checkpoint is not None and getattr(train_loader, "persistent_workers", False):
            raise ValueError(
                "the train_loader has persistent_workers=True: its workers' random streams live on from epoch to epoch "
                "and cannot be put back, so a resumed run would not be the same. Use persistent_workers=False."
            )
        exists = self.checkpoint is not None and self.checkpoint.exists()
        if exists and not resume:
            raise ValueError(
                f"checkpoint {str(self.checkpoint)!r} exists already. Pass resume=True to go on from it, "
                f"or give another path (or remove the file) to start from the beginning."
            )
        start = self._restore(train_loader) if exists else None
        return self._train(train_loader, test_loader, start)

    def _train(
        self, train_loader: Iterable, test_loader: Iterable | None, start: Checkpoint | None
    ) -> Iterator[Record]:
        generators = loader_generators(train_loader)
        for epoch in range(start.epoch if start else 0, self.epochs):
            if start:
                restore_random_state(start.epoch_start, generators)
            epoch_start = random_state(generators)
            batches = enumerate(train_loader, start=1)
            if start and start.batch:
                for _ in range(start.batch):
                    next(batches, None)
                restore_random_state(start.now, generators)
            start = None
            yield from self._train_epoch(epoch, batches, epoch_start, train_loader, test_loader)

    def _train_epoch(
        self,
        epoch: int,
        batches: Iterator[tuple[int, Sequence[Tensor]]],
        epoch_start: dict[str, Any],
        train_loader: Iterable,
        test_loader: Iterable | None,
    ) -> Iterator[Record]:
        """Train on the rest of an epoch, looking one batch ahead to know which is the last."""
        following = next(batches, None)
        if following is None:
            raise ValueError(
                f"the train_loader ({type(train_loader).__name__}) gave no batch in epoch {epoch + 1}. "
                f"It must hold at least one, and be something that can be gone through once an epoch."
            )
        generators = loader_generators(train_loader)
        while following is not None:
            number, batch = following
            self.history.append(self._step(batch))
            step = self.history.step[-1]
            # The next batch may draw from the random streams: their state after this step is read before.
            now = random_state(generators) if _due(self.checkpoint_every, step) else None
            following = next(batches, None)
            ends_epoch = following is None
            ends = ends_epoch and epoch + 1 == self.epochs
            if test_loader is not None and (ends or _due(self.eval_every, step, ends_epoch)):
                self.history.test_accuracy[-1] = self.evaluate(test_loader)
            if self.checkpoint is not None and (ends or _due(self.checkpoint_every, step, ends_epoch)):
                if ends_epoch:
                    now = epoch_start = random_state(generators)
                    self._save(train_loader, epoch + 1, 0, epoch_start, now)
                else:
                    self._save(train_loader, epoch, number, epoch_start, now)
            yield self.history[-1]

    def _step(self, batch: Sequence[Tensor]) -> Record:
        """Train on one batch; only forward, backward and update are timed."""
        *inputs, target = _tensors(batch, self.device)
        self.network.train()
        started = self._clock()
        if isinstance(self.network, Transformed) and self.network.starts_at_labels:
            self.network.start_from(target[target != IGNORED])
        self.optimizer.zero_grad()
        loss = self.loss_fn(self._stepped(*inputs), target)
        loss.backward()
        self.optimizer.step()
        if self.topology is not None:
            self.topology.step()
        seconds = self._clock() - started
        past = self.history[-1] if len(self.history) else Record(0, 0.0, 0, 0, 0.0)
        return Record(
            step=past.step + 1,
            seconds=past.seconds + seconds,
            parameter_updates=past.parameter_updates + updated_scalars(self._parameters),
            flops=past.flops + self.step_flops(inputs),
            loss=loss.item(),
        )

    def step_flops(self, inputs: Sequence[Tensor]) -> int:
        """Count the operations of a step on ``inputs`` with the rows of the last training forward.

        A dense step's are counted as it is done, once for every shape of the inputs; of those of the linear calls a
        sparse step does its share by the network's report. Of an always-sparse step the products with weights are those
        of its report, with an update's in the mean.
        """
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self._dense_flops:
            self._dense_flops[shapes] = dense_flops(self.model, inputs)
        dense, linear = self._dense_flops[shapes]
        if self.topology is not None:
            return self._always_sparse_flops(dense, len(inputs[0]))
        if not isinstance(self.network, Transformed):
            return dense
        one = self.network.report.flops(1)
        return dense - linear + linear * one.total // one.dense_total

    def _always_sparse_flops(self, dense: int, examples: int) -> int:
        assert isinstance(self.network, SparsifiedModule)
        assert self.topology is not None
        report = self.network.report
        if report.flops is None:  # its places are not known, and the share of all is as good as can be said
            return round(dense * report.density)
        step = report.flops.executed(
            self.topology.method, self.topology.interval, self.topology.options.get("gamma", 1.0)
        )
        return round(dense + examples * (step - report.flops.executed_dense))

    def evaluate(self, loader: Iterable) -> float:
        """Measure the share of ``loader``'s targets that the largest output names."""
        mode = self.network.training
        self.network.eval()
        right = count = 0
        with random_state_kept(), torch.no_grad():
            for batch in loader:
                *inputs, target = _tensors(batch, self.device)
                right += int((self.network(*inputs).argmax(-1) == target).sum())
                count += target.numel()
        self.network.train(mode)
        if not count:
            raise ValueError(f"the test_loader ({type(loader).__name__}) gave no batch.")
        return right / count

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _configuration(self, train_loader: Iterable) -> dict[str, Any]:
        kind = type(self.optimizer)
        return {
            **self._settings,
            "optimizer": f"{kind.__module__}.{kind.__qualname__}",
            "batches an epoch": _length(train_loader),
            "examples": _length(getattr(train_loader, "dataset", None)),
            "batch size": getattr(train_loader, "batch_size", None),
            "generators of the loader": len(loader_generators(train_loader)),
            **checkpoints.shapes(self.network),
        }

    def _save(
        self,
        train_loader: Iterable,
        epoch: int,
        batch: int,
        epoch_start: dict[str, Any],
        now: dict[str, Any] | None,
    ) -> None:
        assert self.checkpoint is not None
        assert now is not None
        checkpoints.save(
            self.checkpoint,
            Checkpoint(
                configuration=self._configuration(train_loader),
                model=self.network.state_dict(),
                optimizer=self.optimizer.state_dict(),
                sampler=self._sampler_state(),
                topology=self._topology_state(),
                history=self.history.columns(),
                epoch=epoch,
                batch=batch,
                epoch_start=epoch_start,
                now=now,
            ),
        )

    def _restore(self, train_loader: Iterable) -> Checkpoint:
        """Take on the state in the checkpoint file, all but the random streams, or change nothing."""
        parts = self.network.state_dict(), self.optimizer.state_dict(), self._sampler_state(), self._topology_state()
        before = copy.deepcopy(parts)
        try:
            return self._take_on(train_loader)
        except Exception as error:
            model, optimizer, sampler, topology = before
            self.network.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
            if isinstance(self.network, Transformed):
                self.network.load_sampler_state(sampler)
            if self.topology is not None:
                self.topology.load_state_dict(topology)
            if isinstance(error, ValueError) and "checkpoint" in str(error):
                raise
            raise ValueError(
                f"checkpoint {str(self.checkpoint)!r} is damaged inside ({type(error).__name__}: {error}). Nothing was "
                "changed. Give another file, or remove it to start from the beginning."
            ) from error

    def _sampler_state(self) -> dict[str, Tensor]:
        return self.network.sampler_state() if isinstance(self.network, Transformed) else {}

    def _topology_state(self) -> dict[str, Any]:
        return {} if self.topology is None else self.topology.state_dict()

    def _take_on(self, train_loader: Iterable) -> Checkpoint:
        assert self.checkpoint is not None
        saved = checkpoints.load(self.checkpoint)
        found = checkpoints.differences(self._configuration(train_loader), saved.configuration)
        if found:
            raise ValueError(
                f"checkpoint {str(self.checkpoint)!r} belongs to another run: {'; '.join(found)}. "
                f"Nothing was changed. Give the trainer the file's configuration, or another checkpoint path."
            )
        try:
            self.optimizer.load_state_dict(saved.optimizer)
        except (KeyError, ValueError) as error:
            raise ValueError(f"checkpoint {str(self.checkpoint)!r} is of another optimizer: {error}") from error
        if isinstance(self.network, Transformed):
            self.network.load_sampler_state(saved.sampler)
        self.network.load_state_dict(saved.model)
        if self.topology is not None:
            self.topology.load_state_dict(saved.topology)
        generators = loader_generators(train_loader)
        with random_state_kept():
            kept = [generator.get_state() for generator in generators]
            for state in (saved.epoch_start, saved.now):
                restore_random_state(state, generators)
            for generator, state in zip(generators, kept, strict=True):
                generator.set_state(state)
        if not (isinstance(saved.epoch, int) and isinstance(saved.batch, int)):
            raise TypeError(f"its position is epoch {saved.epoch!r}, batch {saved.batch!r}")
        self.history = History(**saved.history)
        return saved


def _tensors(batch: Any, device: torch.device) -> list[Tensor]:
    parts = batch if isinstance(batch, Sequence) else []
    if len(parts) < 2 or not all(isinstance(part, Tensor) for part in parts):
        what = [type(part).__name__ for part in parts] or type(batch).__name__
        raise ValueError(f"a batch must be a sequence of tensors (input, ..., target), given {what}.")
    return [part.to(device, non_blocking=True) for part in parts]


def _due(every: int | None, step: int, otherwise: bool = False) -> bool:
    return otherwise if every is None else step % every == 0


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _described(options: dict[str, Any]) -> dict[str, str]:
    """Word the options that decide what is computed and are not worded yet; example inputs only help to trace."""
    known = ("example_inputs", "rows", "density")
    return {name: _worded(value) for name, value in sorted(options.items()) if name not in known}


def _worded(value: Any) -> str:
    """Its ``repr``, without the addresses that a function has in this process alone."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _check_choice(name: str, given: Any, allowed: Iterable[str], also: str = "") -> None:
    if not isinstance(given, str) or given not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {choices}{' ' + also if also else ''}; given {given!r}.")


def _check_counts(*, optional: bool = False, **counts: Any) -> None:
    for name, given in counts.items():
        if optional and given is None:
            continue
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ValueError(f"{name} must be a whole number from 1{' or None' if optional else ''}; given {given!r}.")
