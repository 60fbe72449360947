"""What a graph gives out: the nodes behind its output and behind the containers that it is put into there."""

from torch.fx import Graph, Node


def outputs_of(graph: Graph) -> list[Node]:
    """The nodes whose values are given out, each once and in order."""
    given = (node for taker in takers_of(graph) for node in taker.all_input_nodes)
    return list(dict.fromkeys(node for node in given if not _is_container(node)))


def takers_of(graph: Graph) -> list[Node]:
    """The output and, before it, the calls that make its containers (a dataclass, a named tuple), in order."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    takers = {output}
    for node in reversed(graph.nodes):
        if _is_container(node) and any(user in takers for user in node.users):
            takers.add(node)
    return [node for node in graph.nodes if node in takers]


def _is_container(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, type)
