import copy
import math
import pickle

import pytest
import torch

from rwfx.schedules import Cosine, DenseEvery, DenseFirst, Linear, Steps

EQUATIONS = {
    "linear": (Linear(0.5, 0.1, over=10), lambda t: 0.5 - 0.4 * min(t / 10, 1)),
    "linear-up": (Linear(0.1, 0.5, over=10), lambda t: 0.1 + 0.4 * min(t / 10, 1)),
    "cosine": (Cosine(0.9, 0.1, over=8), lambda t: 0.1 + 0.8 * (1 + math.cos(math.pi * min(t / 8, 1))) / 2),
    "steps": (Steps(0.5, {9: 0.1, 3: 0.2}), lambda t: 0.5 if t < 3 else 0.2 if t < 9 else 0.1),
    "dense-first": (DenseFirst(4, 0.1), lambda t: 1 if t < 4 else 0.1),
    "dense-first-then": (DenseFirst(4, Linear(0.5, 0.1, over=4)), lambda t: 1 if t < 4 else 0.5 - 0.1 * min(t - 4, 4)),
    "dense-every": (DenseEvery(3, 0.2), lambda t: 1 if t % 3 == 0 else 0.2),
    "dense-every-and": (DenseEvery(3, Steps(0.4, {6: 0.2})), lambda t: 1 if t % 3 == 0 else 0.4 if t < 6 else 0.2),
}


@pytest.mark.parametrize(("schedule", "equation"), EQUATIONS.values(), ids=EQUATIONS)
def test_a_schedule_is_its_equation_for_a_number_and_a_tensor(schedule, equation):
    for step in range(15):
        assert float(schedule(step)) == pytest.approx(equation(step), abs=1e-12), step
        assert float(schedule(torch.tensor(step))) == pytest.approx(equation(step), abs=1e-12), step


@pytest.mark.parametrize(("schedule", "equation"), EQUATIONS.values(), ids=EQUATIONS)
def test_a_schedule_can_be_copied_saved_and_compared(schedule, equation):
    for other in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other == schedule
        assert repr(other) == repr(schedule)
