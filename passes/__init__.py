"""Passes: functions from a ``GraphModule`` to a ``GraphModule``.

Each leaves its input as it was, shares its parameters, and says in its docstring what it promises. Their
order is the list one reads in ``rwfx.transform``.
"""
