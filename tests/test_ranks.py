import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import rwfx


def train(rank, folder, seed):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    torch.manual_seed(rank)
    sparse = rwfx.transform(model, num_paths=3, seed=seed)
    drawn = []
    for _ in range(3):
        sparse(torch.randn(4, 6)).sum().backward()
        drawn.append(sparse.rows)
    torch.save(drawn, f"{folder}/rows{rank}")
    dist.destroy_process_group()


def test_ranks_draw_equal_rows_with_a_seed_and_without(tmp_path):
    for seed in (7, None):
        folder = tmp_path / str(seed)
        folder.mkdir()
        mp.spawn(train, (str(folder), seed), nprocs=2)
        first, second = (torch.load(folder / f"rows{rank}") for rank in (0, 1))
        torch.testing.assert_close(first, second)
