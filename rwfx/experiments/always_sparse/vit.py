"""A small transformer over patches of an image (see ``networks.vit``).

Axes: B examples, L patches, W width, H heads, S numbers of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4
"""The side of a patch."""


class TinyViT(nn.Module):
    """Patches, their places as sines and cosines, blocks of attention and perceptron, the mean, and a head."""

    places_LW: Tensor

    def __init__(
        self, channels: int, side: int, classes: int, dim: int, depth: int, heads: int, dim_head: int, hidden: int
    ) -> None:
        super().__init__()
        if side % PATCH:
            raise ValueError(f"images of {side} x {side} cannot be cut into patches of {PATCH} x {PATCH}.")
        self.across = side // PATCH
        patch = channels * PATCH**2
        self.embed = nn.Sequential(nn.LayerNorm(patch), nn.Linear(patch, dim), nn.LayerNorm(dim))
        self.register_buffer("places_LW", sines(self.across, dim), persistent=False)
        self.blocks = nn.Sequential(*(_Block(dim, heads, dim_head, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Give the score of each class."""
        cut = x.unflatten(2, (self.across, PATCH)).unflatten(4, (self.across, PATCH))
        patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        h_BLW = self.blocks(self.embed(patches) + self.places_LW)
        return self.head(self.norm(h_BLW.mean(1)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.join = nn.Linear(heads * dim_head, dim, bias=False)
        self.perceptron = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, h_BLW: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h_BLW)).chunk(3, -1)
        q_BHLS, k_BHLS, v_BHLS = (of.unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2) for of in (q, k, v))
        seen_BHLS = F.scaled_dot_product_attention(q_BHLS, k_BHLS, v_BHLS)
        h_BLW = h_BLW + self.join(seen_BHLS.transpose(1, 2).flatten(2))
        return h_BLW + self.perceptron(h_BLW)


def sines(across: int, dim: int) -> Tensor:
    """The places of ``across * across`` patches, ``(L, dim)``: sines and cosines of both axes.

    A quarter of the numbers are sines of the column, one cosines of it, and two those of the row, with wavelengths
    from 2 pi to 10000 times that.
    """
    row, column = torch.meshgrid(torch.arange(across), torch.arange(across), indexing="ij")
    frequency = 10000.0 ** -torch.linspace(0, 1, dim // 4)
    x, y = (of.flatten()[:, None] * frequency for of in (column, row))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
