"""``python -m rwfx.experiments always-sparse``: methods that train the non-zeros of a network alone, and move them."""
