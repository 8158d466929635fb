"""Convert API workflows, {id: {"class_type", "inputs", "_meta"}}: what POST /prompt takes and "Export (API)" writes.
See
convert_workflow.py.
"""

import copy

from convert_rules import LOADERS, MARK, SELECTOR, Graph, Node


def understands(data):
    return (
        bool(data)
        and isinstance(data, dict)
        and all(
            isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
            for node in data.values()
        )
    )


def link(value):
    """The id of the node that an input is connected to, or None."""
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
    return value[0] if is_link else None


def scope(identity):
    """The subgraph of a node: the page writes node 12 of the subgraph that is node 98 as 98:12."""
    return identity.rpartition(":")[0]


def graph(data):
    nodes = {(scope(key), key): view(key, node) for key, node in data.items()}
    pairs = [
        ((scope(source), source), (scope(key), key))
        for key, node in data.items()
        for source in map(link, node["inputs"].values())
        if source
    ]
    return Graph(
        nodes,
        [pair for pair in pairs if pair[0][0] == pair[1][0]],
        [pair for pair in pairs if pair[0][0] != pair[1][0]],
    )


def view(key, node):
    return Node(
        node["class_type"],
        f"{node['class_type']} {key}",
        plain(node),
        frozenset(node["inputs"]) - frozenset(plain(node)),
    )


def plain(node):
    """The inputs that are values, not connections."""
    return {name: value for name, value in node["inputs"].items() if link(value) is None}


def converted(data):
    """Whether some node carries the mark of a conversion."""
    return any(map(mark, data.values()))


def convert(data, plan, backend):
    """The converted workflow and the keys of the new selectors."""
    result = copy.deepcopy(data)
    for (_, key), row in plan.replace.items():
        replace(result[key], row)
    added = [add_selector(result, key, backend) for _, key in plan.models]
    return result, [(scope(key), key) for key in added if key]


def replace(node, row):
    original, names = copy.deepcopy(node), row.names()
    connected = {
        names[name]: value for name, value in node["inputs"].items() if link(value) is not None and name in names
    }
    node["class_type"] = row.new
    node["inputs"] = {**row.added, **row.forward(plain(original)), **connected}
    node["_meta"] = {**(node.get("_meta") or {}), MARK: {"replaced": original}}


def add_selector(data, loader, backend):
    """Put a selector between a loader and all that it feeds; returns its id, or None where it is not needed."""
    fed = [(node, name) for node in data.values() for name, value in node["inputs"].items() if link(value) == loader]
    if not fed or any(node["class_type"] == SELECTOR for node, _ in fed):
        return None
    numbers = [int(part) for key in data for part in key.split(":") if part.isdigit()]
    new = ":".join(filter(None, (scope(loader), str(max(numbers, default=0) + 1))))
    for node, name in fed:
        node["inputs"][name] = [new, 0]
    data[new] = {
        "class_type": SELECTOR,
        "inputs": {"model": [loader, 0], "backend": backend},
        "_meta": {"title": "Select Attention", MARK: {"added": True}},
    }
    return new


def mark(node):
    return (node.get("_meta") or {}).get(MARK) or {}


def undo(data):
    """The workflow before `convert`, with what was changed since."""
    result = copy.deepcopy(data)
    for key in [key for key, node in result.items() if "added" in mark(node)]:
        take_out(result, key)
    return {key: restored(node) if "replaced" in mark(node) else node for key, node in result.items()}


def take_out(data, selector):
    """Remove a selector; what it fed is fed by what fed it, or by nothing."""
    source = data.pop(selector)["inputs"].get("model")
    for node in data.values():
        node["inputs"] = {
            name: source if link(value) == selector else value
            for name, value in node["inputs"].items()
            if source is not None or link(value) != selector
        }


def restored(node):
    original = copy.deepcopy(mark(node)["replaced"])
    row = LOADERS[original["class_type"]]
    connected = {
        old: node["inputs"][new] for old, new in row.names().items() if link(node["inputs"].get(new)) is not None
    }
    original["inputs"] = {**original["inputs"], **row.back(plain(node), plain(original)), **connected}
    return original
