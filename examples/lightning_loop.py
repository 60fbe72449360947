"""Train a small network with Lightning, with mixed precision, accumulation and clipping, leaving out rows and examples.

    pip install lightning scikit-learn
    python examples/lightning_loop.py

About twenty seconds. Prints the accuracy on held-out digits, which the model it was made from has as well.
"""

import logging

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rwfx


class Digits(lightning.LightningModule):
    """A transformed network is a module like any other."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, of PyTorch: the gradients are dense, with zeros."""
        return torch.optim.Adam(self.network.parameters(), lr=2e-3)


def main() -> None:
    """Train and judge."""
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=32, shuffle=True)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    sparse_model = rwfx.transform(model, rows=rwfx.TopK(0.25), examples=0.5, break_even=False)
    trainer = lightning.Trainer(
        max_epochs=12,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(sparse_model), train)

    model.eval().cpu()
    accuracy = float((model(x[1500:]).argmax(1) == y[1500:]).float().mean())
    print(sparse_model.report)
    print(f"accuracy {accuracy:.1%}")
    assert accuracy > 0.85


if __name__ == "__main__":
    main()
