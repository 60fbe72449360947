"""Experiments from the command line: ``python -m rwfx.experiments accuracy`` and ``... speed``."""
