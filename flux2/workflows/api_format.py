"""Convert API workflows, {id: {"class_type", "inputs", "_meta"}}: what POST /prompt takes and "Export (API)" writes.
See convert.py.
"""

import copy

from .rules import LOADERS, MARK, SELECTOR, Graph, Node


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
    models = given_models(data)
    nodes = {(scope(key), key): view(key, node, models.get(key)) for key, node in data.items()}
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


def given_models(data):
    """{id: output} of the nodes that give others a MODEL and are given none. The file has no types: a MODEL is what
    goes into an input of that name.
    """
    taken = {key for key, node in data.items() for name, value in node["inputs"].items() if is_model(name, value)}
    return {
        link(value): value[1]
        for node in data.values()
        for name, value in node["inputs"].items()
        if is_model(name, value) and link(value) in data and link(value) not in taken
    }


def is_model(name, value):
    return link(value) is not None and (name == "model" or name.startswith("model."))


def view(key, node, model):
    values = plain(node)
    return Node(
        node["class_type"],
        f"{node['class_type']} {key}",
        values,
        frozenset(node["inputs"]) - frozenset(values),
        model,
        tuple(value for value in values.values() if isinstance(value, str)),
    )


def plain(node):
    """The inputs that are values, not connections."""
    return {name: value for name, value in node["inputs"].items() if link(value) is None}


def converted(data):
    """Whether some node carries the mark of a conversion."""
    return any(map(mark, data.values()))


def convert(data, plan, backend):
    """The converted workflow and [(key of a new selector, key of its loader)]."""
    result = copy.deepcopy(data)
    for (_, key), row in plan.replace.items():
        replace(result[key], row)
    added = add_selectors(result, {key[1]: plan.outputs.get(key, 0) for key in plan.models}, backend)
    return result, [((scope(new), new), loader) for new, loader in zip(added, plan.models) if new]


def replace(node, row):
    original, names = copy.deepcopy(node), row.names()
    connected = {
        names[name]: value for name, value in node["inputs"].items() if link(value) is not None and name in names
    }
    node["class_type"] = row.new
    node["inputs"] = {**row.added, **row.forward(plain(original)), **connected}
    node["_meta"] = {**(node.get("_meta") or {}), MARK: {"replaced": original}}


def add_selectors(data, loaders, backend):
    """Put a selector between each loader {id: output} and all that its MODEL feeds; returns the new ids, None where
    none is needed.
    """
    fed = {(key, output): [] for key, output in loaders.items()}
    for node in data.values():
        for name, value in node["inputs"].items():
            if link(value) is not None and tuple(value) in fed:
                fed[tuple(value)].append((node, name))
    last = max((int(part) for key in data for part in key.split(":") if part.isdigit()), default=0)
    added = []
    for (loader, output), readers in fed.items():
        if not readers or any(node["class_type"] == SELECTOR for node, _ in readers):
            added.append(None)
            continue
        last += 1
        new = ":".join(filter(None, (scope(loader), str(last))))
        for node, name in readers:
            node["inputs"][name] = [new, 0]
        data[new] = {
            "class_type": SELECTOR,
            "inputs": {"model": [loader, output], "backend": backend},
            "_meta": {"title": "Select Attention", MARK: {"added": True}},
        }
        added.append(new)
    return added


def mark(node):
    return (node.get("_meta") or {}).get(MARK) or {}


def undo(data):
    """The workflow before `convert`, with what was changed since."""
    result = copy.deepcopy(data)
    take_out(result, [key for key, node in result.items() if "added" in mark(node)])
    return {key: restored(node) if "replaced" in mark(node) else node for key, node in result.items()}


def take_out(data, selectors):
    """Remove selectors; what one fed is fed by what fed it, or by nothing."""
    sources = {key: data.pop(key)["inputs"].get("model") for key in selectors}

    def source(value):
        while link(value) in sources:
            value = sources[link(value)]
        return value

    for node in data.values():
        node["inputs"] = {
            name: source(value)
            for name, value in node["inputs"].items()
            if link(value) not in sources or source(value) is not None
        }


def restored(node):
    original = copy.deepcopy(mark(node)["replaced"])
    row = LOADERS[original["class_type"]]
    connected = {
        old: node["inputs"][new] for old, new in row.names().items() if link(node["inputs"].get(new)) is not None
    }
    original["inputs"] = {**original["inputs"], **row.back(plain(node), plain(original)), **connected}
    return original
