"""``python -m rwfx.experiments policies``: the ways to choose rows, beside dense runs of the same cost."""
