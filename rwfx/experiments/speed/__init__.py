"""``python -m rwfx.experiments speed``: the time and memory of a step, beside the dense one's."""
