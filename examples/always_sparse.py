"""Train a network of which a fiftieth of the connections exists, and let guided stochastic exploration move them.

    pip install scikit-learn
    python examples/always_sparse.py

About ten seconds, once the kernels are compiled. Prints how many non-zeros there are, and the accuracy on held-out
digits, beside that of the same network whose connections stay where they were drawn.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import rwfx

STEPS, BATCH = 600, 128


def main() -> None:
    """Train with fixed and with moving connections; the non-zeros stay as many."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    held_out = slice(1500, None)
    accuracies = {}
    for method in ("static", "gse"):
        torch.manual_seed(0)
        # On the meta device: no dense weight is ever made.
        with torch.device("meta"):
            network = nn.Sequential(
                nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
            )
        model = rwfx.sparsify(network, density=0.02, growth=method, seed=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        topology = rwfx.Topology(model, optimizer, interval=50, end=450)
        nnz = model.nnz
        for _ in range(STEPS):
            batch = torch.randint(1500, (BATCH,))
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()
        assert model.nnz == nnz
        with torch.no_grad():
            right = model.eval()(x[held_out]).argmax(1) == y[held_out]
        accuracies[method] = float(right.float().mean())
    print(model.report)
    print("accuracy", ", ".join(f"{method} {accuracy:.1%}" for method, accuracy in accuracies.items()))
    assert accuracies["gse"] > 0.9


if __name__ == "__main__":
    main()
