"""The zoo: models as people train them, transformed and compared with themselves.

    python -m rwfx.experiments zoo --suites hugging_face,timm

Every model of torchvision, one of each module of timm, and architectures of Hugging Face from small configurations, all
with random weights and in train mode: by which route each is captured, how many of its linear and convolution weights
become row-sparse and why the others do not, whether outputs and buffers are the model's own bit for bit, how far the
gradients are from those of plain autograd with masks (in float64 where the model runs in it), whether the keys of the
``state_dict`` are the model's, and how many graphs ``torch.compile`` makes.

Written are ``zoo.csv`` (a line after every model; what it holds is not checked again, so that a program that was
stopped goes on where it is started again) and ``zoo.md``.
"""

import os

from tqdm.auto import tqdm

from rwfx.experiments.machine import as_markdown, conditions
from rwfx.experiments.policies.run import check_folder
from rwfx.experiments.tables import read_csv, write_csv
from rwfx.experiments.zoo.apart import Lost, call_apart
from rwfx.experiments.zoo.catalogue import Entry
from rwfx.experiments.zoo.check import check
from rwfx.experiments.zoo.plan import Plan, entries_of
from rwfx.experiments.zoo.records import Record, problem_of
from rwfx.experiments.zoo.report import report
from rwfx.files import replacing


def run(plan: Plan, *, progress: bool = True) -> list[Record]:
    """Check the models of ``plan``, write the files into ``plan.out`` and print how many are as they should be.

    Returns:
        The records of these models, those that were there before included.

    Raises:
        ValueError, ImportError: something about the plan will not do; before any work.
    """
    wanted = entries_of(plan)
    check_folder(plan.out)
    path = plan.out / "zoo.csv"
    records = {record.entry: record for record in read_csv(path, Record)}
    to_do = [entry for entry in wanted if not _is_done(plan, records.get(str(entry)))]
    with tqdm(total=len(to_do), unit="model", disable=not progress) as bar:
        for entry in to_do:
            bar.set_description(str(entry))
            records[str(entry)] = checked(entry, plan.limit)
            write_csv(path, Record, list(records.values()))
            bar.update()
    found = [records[str(entry)] for entry in wanted]
    with replacing(plan.out / "zoo.md", "w") as file:
        file.write(f"# The zoo\n\n{report(found)}\n\n## Conditions\n\n{as_markdown(conditions())}\n")
    problems = [f"{record.entry}: {problem_of(record)}" for record in found if problem_of(record)]
    print("\n".join([*problems, f"{len(found) - len(problems)} of {len(found)} models are as they should be"]))
    print(f"written: {os.fspath(plan.out)}/")
    return found


def checked(entry: Entry, limit: float) -> Record:
    """Check a model in a process of its own."""
    try:
        return call_apart(check, entry, limit=limit)
    except Lost as error:
        return Record(entry.suite, entry.model, error=f"{type(error).__name__}: {error}")


def _is_done(plan: Plan, record: Record | None) -> bool:
    return record is not None and not (plan.again and problem_of(record))
