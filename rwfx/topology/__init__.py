"""Topology: which connections an always-sparse model has, moved while it trains.

backward pass: a probe of each weight finds candidates --> parts --> methods choose the next keys --> weights and
optimizer states are moved there
"""

from rwfx.topology.topology import Topology

__all__ = ["Topology"]
