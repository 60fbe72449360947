"""``python -m rwfx.experiments frontier``: a backward on fewer rows and examples, beside dense of the same cost."""
