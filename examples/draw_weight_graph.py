"""Pictures of two weight graphs, with the rows that walks visit and the rows that training drew.

    python examples/draw_weight_graph.py --out results/pictures        # needs rwfx[draw,experiments]

It takes about ten seconds on two idle cores. It trains a 3-layer network (64-48-32-10) and a residual network of 20
layers on scikit-learn's digits, writes four pictures and prints their paths. Then it prints, for each hidden layer of
the first network, how well the visits of walks agree with the chance that its weights give a row, and asserts it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rwfx
from rwfx import draw


class MLP(nn.Module):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 48), nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of ``(B, 64)`` pixels."""
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


class Residual(nn.Module):
    """A first and a last layer, and between them blocks whose output is added to their input."""

    def __init__(self, layers: int = 20) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers - 2))

    def forward(self, x: Tensor) -> Tensor:
        """The logits of ``(B, 64)`` pixels."""
        h = self.stem(x)
        for block in self.blocks:
            h = h + 0.2 * block(h).relu()
        return self.head(h)


def train(model: nn.Module, steps: int, num_paths: int) -> Iterator[dict[str, Tensor]]:
    """Train ``model`` and yield the row sets of each step."""
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    sparse_model = rwfx.transform(model, rows=rwfx.RandomWalk(num_paths, min_rows=0), seed=0, break_even=False)
    optimizer = torch.optim.Adam(sparse_model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,))
        loss = F.cross_entropy(sparse_model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield sparse_model.rows


def main() -> None:
    """Train, draw, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/pictures"))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.manual_seed(0)

    mlp, residual = MLP(), Residual()
    graph, deep = rwfx.weight_graph(mlp), rwfx.weight_graph(residual)
    draws = draw.count_draws(graph, train(mlp, args.steps, num_paths=10))
    deep_draws = draw.count_draws(deep, train(residual, args.steps // 4, num_paths=50))
    walks = rwfx.random_walks(graph, dict(mlp.named_parameters()), num_paths=50)
    deep_walks = rwfx.random_walks(deep, dict(residual.named_parameters()), num_paths=50)

    pictures = {
        "weight_graph.png": draw.draw_graph(graph, walks=walks),
        "weight_graph_draws.png": draw.draw_graph(graph, visits=draws, title=f"Rows drawn in {args.steps} steps"),
        "residual.png": draw.draw_graph(deep, walks=deep_walks),
        "residual_draws.png": draw.draw_graph(deep, visits=deep_draws),
    }
    for name, axes in pictures.items():
        draw.save(axes.figure, args.out / name, dpi=168)
        print(args.out / name)

    # At the output walks start anywhere; to a hidden row they come with a chance that follows from the weights after
    # it. Many walks must agree with it; the draws of training agree less, for its weights changed on the way.
    visits = draw.count_visits(graph, rwfx.random_walks(graph, dict(mlp.named_parameters()), num_paths=100_000))
    chance = torch.full((10,), 0.1)
    for weight, after in (("fc2.weight", mlp.fc3.weight), ("fc1.weight", mlp.fc2.weight)):
        size = after.detach().abs()
        chance = chance @ (size / size.sum(1, keepdim=True))
        agreement = rank_correlation(visits[weight], chance)
        trained = rank_correlation(draws[weight], chance)
        print(f"{weight}: rank correlation with the chance: visits {agreement:.2f}, draws of training {trained:.2f}")
        assert agreement > 0.9


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """1 where two vectors put their entries in the same order, 0 where they have nothing to do with each other."""
    return float(torch.corrcoef(torch.stack([a, b]).argsort(1).argsort(1))[0, 1])


if __name__ == "__main__":
    main()
