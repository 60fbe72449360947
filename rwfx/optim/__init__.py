"""SGD, Adam and AdamW that touch only the rows they are given.

In: parameters whose ``.grad`` is dense, or a *row gradient*: a hybrid ``torch.sparse_coo`` tensor with
``sparse_dim=1``, indices ``(1, K)`` (the rows) and values ``(K, ...)`` (their gradients), the layout of
``nn.Embedding(sparse=True)``. Out: the parameters, updated in place.

For a dense gradient each is its ``torch.optim`` namesake, whose arguments, hooks and ``state_dict`` it has. For a row
gradient ``unvisited``, an argument and an entry of each group, chooses what becomes of the other rows:

==============  ========================================  =====================================  =====================
``unvisited``   a row that is not drawn                   when it is drawn again                 it is
==============  ========================================  =====================================  =====================
``"frozen"``    keeps its weights and its moments, and    goes on from where it was; its bias    one namesake per row
                does not age                              correction counts its own updates
``"moving"``    has a gradient of zero: momentum moves    has nothing to make up for             the namesake, on the
                it, its moments and weights decay                                                gradient filled with
                                                                                                 zeros
``"owed"``      is not touched, but ages                  first pays the decay of its moments,   as ``"moving"``, but
                                                          and of its weights where that is       for the movement of
                                                          decoupled, for each step it missed     the rows not drawn
==============  ========================================  =====================================  =====================

``"frozen"`` and ``"owed"`` cost what the rows drawn cost; ``"moving"`` costs a dense update and a dense copy of each
gradient.

>>> import torch, rwfx.optim
>>> w = torch.nn.Parameter(torch.ones(3, 2))
>>> w.grad = torch.sparse_coo_tensor([[2]], torch.tensor([[1.0, 2.0]]), w.shape)
>>> rwfx.optim.SGD([w], lr=0.5).step()
>>> w.tolist()
[[1.0, 1.0], [1.0, 1.0], [0.5, 0.0]]
"""

from rwfx.optim.adam import Adam
from rwfx.optim.adamw import AdamW
from rwfx.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
