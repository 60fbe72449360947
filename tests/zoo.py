"""Small models of every shape that ``transform`` promises to take, with inputs for each."""

import operator

import torch
import torch.nn.functional as F
from torch import nn


class Case(nn.Module):
    """A model with ``inputs()`` to call it with."""

    shape: tuple[int, ...] = (5, 12)

    def inputs(self):
        return (torch.randn(self.shape, dtype=torch.float64),), {}


class Modules(Case):
    shape = (5, 3, 4)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(16, 10, bias=False), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


class Functional(Case):
    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(9, 12)), nn.Parameter(torch.randn(9))
        self.w2 = nn.Parameter(torch.randn(7, 9))
        self.w3, self.b3 = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        h = F.dropout(F.relu(F.linear(x, weight=self.w1, bias=self.b1)), 0.2, self.training)
        return F.linear(torch.tanh(F.linear(h, self.w2)), self.w3, self.b3)


class Products(Case):
    """``x @ w.t()`` and its spellings."""

    def __init__(self):
        super().__init__()
        sizes = [(9, 12), (8, 9), (7, 8), (6, 7), (3, 6)]
        self.w = nn.ParameterList([nn.Parameter(torch.randn(o, i)) for o, i in sizes])
        self.b = nn.Parameter(torch.randn(3))

    def forward(self, x):
        h = (x @ self.w[0].t()).relu()
        h = torch.matmul(h, self.w[1].T).sigmoid()
        h = h.matmul(self.w[2].transpose(0, 1)).tanh()
        h = operator.matmul(h, self.w[3].mT).abs()
        return torch.addmm(self.b, h, self.w[4].t())


class Residual(Case):
    def __init__(self, blocks=3):
        super().__init__()
        self.stem = nn.Linear(12, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(blocks)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h).relu()
        return self.head(h)


class Concat(Case):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 6), nn.Linear(12, 5)
        self.c, self.d = nn.Linear(11, 8), nn.Linear(8 + 12, 3)

    def forward(self, x):
        h = self.c(torch.cat([self.a(x).relu(), self.b(x).tanh()], dim=1))
        return self.d(torch.cat([h, x], -1))


class Heads(Case):
    """Several inputs, one by keyword, one with a default; several outputs, in a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(7, 8)
        self.class_head, self.box_head = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x, z, scale=None):
        h = torch.relu(self.a(x) + self.b(z))
        h = h if scale is None else h * scale
        return {"class": self.class_head(h), "box": (self.box_head(h), h.mean())}

    def inputs(self):
        return (torch.randn(5, 12, dtype=torch.float64),), {"z": torch.randn(5, 7, dtype=torch.float64)}


class Twice(Case):
    """One module called twice, and two modules with one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.tied = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.shared.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.shared(self.shared(self.stem(x)).relu())
        return self.head(self.tied(h).tanh())


class Sequence(Case):
    """Three dimensions, reshapes, and a mean over tokens."""

    shape = (2, 6, 12)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(4, 6)
        self.c, self.head = nn.Linear(12, 5), nn.Linear(5, 3)

    def forward(self, x):
        b, t, _ = x.shape
        h = self.a(x).view(b, t, 2, 4).transpose(2, 3).reshape(b, t, 8)
        left, right = h.chunk(2, dim=-1)
        h = torch.cat([self.b(left), self.b(right)], -1)
        return self.head(self.c(h).relu().mean(dim=1))


class Frozen(Case):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.a.requires_grad_(False)
        self.b.weight.requires_grad_(False)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


class Single(Case):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(x)


class Gated(Case):
    """A gated unit and a constant that tracing makes."""

    def __init__(self):
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = F.silu(self.gate(x)) * self.value(x)
        return self.out(h + torch.arange(8))


ZOO = [Modules, Functional, Products, Residual, Concat, Heads, Twice, Sequence, Frozen, Single, Gated]


def make(kind):
    torch.manual_seed(0)
    return kind().double()


def loss_of(output):
    """A scalar in which every output has a part, with gradients that differ everywhere."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return sum(
        (leaf * torch.linspace(1, 2, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)).sin().sum() for leaf in leaves
    )


def model_with(forward, *widths, **parts):
    """A model with this forward pass, two layers ``a`` and ``b`` of three widths, and more parts by name."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(*widths[:2]), nn.Linear(*widths[1:])
            for name, part in parts.items():
                if isinstance(part, torch.Tensor):
                    self.register_buffer(name, part)
                else:
                    setattr(self, name, part)

    Model.forward = forward
    return Model()
