"""Convert the workflows that ComfyUI's page saves: nodes, links (arrays or objects), groups, subgraph definitions. See
convert.py.

A replaced node keeps what it was in its own properties, so `undo` works on a graph that was opened, changed and saved
since. Existing ids of nodes and links never change: a selector takes over the loader's links and gets one new link from
the loader.
"""

import copy
import re

from . import layout
from .rules import LOADERS, MARK, SELECTOR, Graph, Node, NotConvertible

PACK_ID = "flux2-attention"  # lets ComfyUI-Manager find the pack where its nodes are missing
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
BORDER = (-10, -20)  # the ids that a subgraph's own inputs and outputs have in its links
DRAWN = ("pos", "size")
KEPT = ("type", *DRAWN, "inputs", "widgets_values", "properties")  # what replacing changes in a node
GETTERS = re.compile(r"getnode", re.IGNORECASE)  # of packs that connect without links
OURS = (MARK, "cnr_id", "Node name for S&R", "ver")  # properties that say which node it is


def understands(data):
    if not isinstance(data, dict):
        return False
    return all(
        isinstance(part.get("nodes"), list) and isinstance(part.get("links", []), list) for _, part in scopes(data)
    )


def scopes(data):
    """(name, graph) of the canvas, whose name is "", and of every subgraph definition."""

    def definitions(part):
        for inner in (part.get("definitions") or {}).get("subgraphs") or []:
            yield inner["id"], inner
            yield from definitions(inner)

    yield "", data
    yield from definitions(data)


def get(link, name):
    return link[LINK.index(name)] if isinstance(link, list) else link.get(name)


def put(link, name, value):
    link[LINK.index(name) if isinstance(link, list) else name] = value


def links_of(part):
    return [link for link in part.get("links") or [] if link]


def mark(node):
    return (node.get("properties") or {}).get(MARK) or {}


def converted(data):
    """Whether some node carries the mark of a conversion."""
    return any(mark(node) for _, part in scopes(data) for node in part["nodes"])


# --- what the rules need to know -------------------------------------------------------------------------------------


def graph(data):
    parts = dict(scopes(data))
    nodes = {
        (scope, node["id"]): view(part if scope else {}, node, node["type"] in parts)
        for scope, part in parts.items()
        for node in part["nodes"]
    }
    nodes |= {(scope, border): Node("border", "", {}) for scope in parts if scope for border in BORDER}
    edges = [
        ((scope, get(link, "origin_id")), (scope, get(link, "target_id")))
        for scope, part in parts.items()
        for link in links_of(part)
    ]
    bridges = [(key, (node.type, border)) for key, node in nodes.items() if node.type in parts for border in BORDER]
    return Graph(nodes, edges, bridges)


def view(subgraph, node, is_subgraph):
    linked = [entry for entry in node.get("inputs") or [] if entry.get("link") is not None]
    place = f" in {subgraph.get('name') or subgraph['id']}" if subgraph else ""
    # a reroute's input takes anything, and a getter's comes without a link
    passes_on = (
        is_subgraph or GETTERS.search(node["type"]) or any(entry.get("type") in ("MODEL", "*") for entry in linked)
    )
    saved = node.get("widgets_values") or []
    return Node(
        node["type"],
        f"{node['type']} {node['id']}{place}",
        values_of(node),
        frozenset(entry["name"] for entry in linked),
        None if passes_on else given_model(node),
        tuple(text for text in (saved.values() if isinstance(saved, dict) else saved) if isinstance(text, str)),
    )


def given_model(node):
    """Which output gives a MODEL to other nodes, or None."""
    outputs = enumerate(node.get("outputs") or [])
    return next((place for place, output in outputs if output.get("type") == "MODEL" and output.get("links")), None)


def values_of(node):
    """{widget: value} of one of ComfyUI's loaders."""
    row = LOADERS.get(node["type"])
    return values_by_name(node, [widget.old for widget in row.widgets]) if row else {}


def values_by_name(node, names):
    """{widget: value}; names: of the widgets in the order in which a node saves them, if it saves no names."""
    saved = node.get("widgets_values") or []
    return (
        saved
        if isinstance(saved, dict)
        else dict(zip(names + [f"number {place}" for place in range(len(names) + 1, len(saved) + 1)], saved))
    )


# --- there -----------------------------------------------------------------------------------------------------------


def convert(data, plan, backend):
    """The converted workflow and [(key of a new selector, key of its loader)]."""
    result, before = copy.deepcopy(data), counters(data)
    users, ids, models, added = instances(result), next_ids(result), set(plan.models), []
    for scope, part in scopes(result):
        replaced = [node for node in part["nodes"] if (scope, node["id"]) in plan.replace]
        canvas = layout.Canvas(part, len(replaced) + sum(key[0] == scope for key in models))
        for node in replaced:
            replace(result, users, scope, part, node, plan.replace[scope, node["id"]])
        arrange(canvas, replaced)
        loaders = [node for node in part["nodes"] if (scope, node["id"]) in models]
        outputs = [plan.outputs.get((scope, node["id"]), 0) for node in loaders]
        new = add_selectors(result, part, canvas, zip(loaders, outputs), ids, backend)
        added += [((scope, selector), (scope, loader)) for selector, loader in new]
    changed = {scope: [before[scope], after] for scope, after in counters(result).items() if after != before[scope]}
    result["extra"] = {**(result.get("extra") or {}), MARK: {"counters": changed, "had_extra": "extra" in data}}
    return result, added


def replace(data, users, scope, part, node, row):
    before = {name: copy.deepcopy(node[name]) for name in KEPT if name in node}
    values = {**row.forward(values_of(node)), **row.added}
    node["type"] = row.new
    if node.get("inputs"):
        change_inputs(
            part, node, [renamed(entry, row.names()) for entry in node["inputs"] if entry["name"] in row.names()]
        )
    if node.get("widgets_values"):  # without any, the page fills in ours
        node["widgets_values"] = values if isinstance(node["widgets_values"], dict) else list(values.values())
    properties = {name: value for name, value in (node.get("properties") or {}).items() if name != "ver"}
    node["properties"] = {**properties, "Node name for S&R": row.new, "cnr_id": PACK_ID, MARK: {"replaced": before}}
    rename_widgets(data, users, scope, node["id"], row.names())


def arrange(canvas, replaced):
    """Make room for the widgets of replaced nodes, and note where that put them."""
    for node in replaced:
        layout.grow(node)
        canvas.put(node)
    layout.settle(canvas, replaced)
    for node in replaced:
        mark(node)["drawn"] = {name: copy.deepcopy(node.get(name)) for name in DRAWN}


def renamed(entry, names):
    """An input slot under its new name. Its label is the user's and stays."""
    old, new = entry["name"], names[entry["name"]]
    entry = copy.deepcopy(entry)
    for holder, field in ((entry, "name"), (entry, "localized_name"), (entry.get("widget") or {}, "name")):
        if holder.get(field) == old:
            holder[field] = new
    return entry


def change_inputs(part, node, inputs):
    """Give a node other inputs; links to one that moved go to its new place."""
    places = {entry["link"]: place for place, entry in enumerate(inputs) if entry.get("link") is not None}
    moved = {
        entry["link"]
        for place, entry in enumerate(node.get("inputs") or [])
        if places.get(entry.get("link"), place) != place
    }
    for link in links_of(part) if moved else []:
        if get(link, "id") in moved:
            put(link, "target_slot", places[get(link, "id")])
    node["inputs"] = inputs


def instances(data):
    """{subgraph: [(holder, node)]}: the nodes that are subgraphs, and the scopes that they are in."""
    found = {}
    inner = {scope for scope, _ in scopes(data) if scope}
    for holder, part in scopes(data):
        for node in part["nodes"]:
            if node["type"] in inner:
                found.setdefault(node["type"], []).append((holder, node))
    return found


def rename_widgets(data, users, scope, identity, names):
    """Rename what refers to a node's widgets by name: the widgets that subgraph nodes show, and the inputs of the app
    mode. users: from `instances`.
    """
    for holder, node in users.get(scope, ()):
        for entry in (node.get("properties") or {}).get("proxyWidgets") or []:
            if str(entry[0]) == str(identity):
                rename_shown(data, users, holder, node, entry, names)
    for entry in ((data.get("extra") or {}).get("linearData") or {}).get("inputs") or []:
        if not scope and str(entry[0]) == str(identity):
            entry[1] = names.get(entry[1], entry[1])


def rename_shown(data, users, holder, node, entry, names):
    """Rename a widget that a subgraph node shows; where that node is in a subgraph itself, also further out."""
    prefix, name = re.fullmatch(r"((?:\d+: )*)(.*)", entry[1]).groups()
    if name in names:
        entry[1] = prefix + names[name]
        if not any(entry["name"] == name for entry in node.get("inputs") or []):
            rename_widgets(data, users, holder, node["id"], {name: names[name]})


def add_selectors(data, part, canvas, loaders, ids, backend):
    """Put a selector between each loader [(node, output)] and all that its MODEL feeds; returns [(id of a new one,
    id of its loader)].

    ids: [node id, link id] that are free next, counted on here.
    """
    loaders = list(loaders)
    links = {get(link, "id"): link for link in links_of(part)} if loaders else {}
    types = {node["id"]: node["type"] for node in part["nodes"]} if loaders else {}
    added = []
    for loader, place in loaders:
        output = (loader.get("outputs") or [{}] * (place + 1))[place]
        fed = [links[link] for link in output.get("links") or [] if link in links]
        if not fed or any(types.get(get(link, "target_id")) == SELECTOR for link in fed):
            continue
        node_id, link_id = ids
        ids[:] = node_id + 1, link_id + 1
        selector = new_selector(canvas, loader, place, node_id, link_id, backend)
        for link in fed:
            put(link, "origin_id", node_id)
            put(link, "origin_slot", 0)
        part["links"].append(new_link(fed[0], link_id, loader["id"], place, node_id))
        part["nodes"].append(selector)
        canvas.put(selector)
        output["links"] = [link_id]
        for changed in (data, part):
            set_counter(changed, node_id, link_id)
        added.append((node_id, loader["id"]))
    return added


def new_selector(canvas, loader, output, node_id, link_id, backend):
    """The selector for a loader, which gives it its links."""
    size = list(layout.SELECTOR_SIZE)
    return {
        "id": node_id,
        "type": SELECTOR,
        "pos": canvas.nearest(layout.pair(loader["pos"]), size),
        "size": size,
        "flags": {},
        "order": loader.get("order", 0) + 1,
        "mode": loader.get("mode", 0),
        "inputs": [{"name": "model", "type": "MODEL", "link": link_id}],
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": loader["outputs"][output]["links"]}],
        "properties": {"Node name for S&R": SELECTOR, "cnr_id": PACK_ID, MARK: {"added": True}},
        "widgets_values": [backend],
    }


def new_link(like, link_id, origin, output, target):
    values = (link_id, origin, output, target, 0, "MODEL")
    return list(values) if isinstance(like, list) else dict(zip(LINK, values))


# --- the counters of ids ---------------------------------------------------------------------------------------------


def next_ids(data):
    """[node id, link id] that nothing in the whole file has: the page wants node ids to differ between subgraphs
    too.
    """
    parts = [part for _, part in scopes(data)]
    nodes = [int(node["id"]) for part in parts for node in part["nodes"] if str(node["id"]).isdigit()]
    links = [get(link, "id") for part in parts for link in links_of(part)]
    last = zip(*map(counter, parts))
    return [max([*used, *said, 0]) + 1 for used, said in zip((nodes, links), last)]


def counter(part):
    """(last node id, last link id) as the file says."""
    state = part.get("state") or {}
    return part.get("last_node_id") or state.get("lastNodeId") or 0, part.get("last_link_id") or state.get(
        "lastLinkId"
    ) or 0


def counters(data):
    return {scope: list(counter(part)) for scope, part in scopes(data)}


def set_counter(part, node_id, link_id):
    for holder, names in (
        (part, ("last_node_id", "last_link_id")),
        (part.get("state") or {}, ("lastNodeId", "lastLinkId")),
    ):
        for name, value in zip(names, (node_id, link_id)):
            if name in holder:
                holder[name] = value


# --- and back --------------------------------------------------------------------------------------------------------


def undo(data):
    """The workflow before `convert`, with what was changed since."""
    result = copy.deepcopy(data)
    users = instances(result)
    for scope, part in scopes(result):
        for node in [node for node in part["nodes"] if "added" in mark(node)]:
            take_out(part, node)
        for node in part["nodes"]:
            if "replaced" in mark(node):
                restore(result, users, scope, part, node)
    forget(result)
    return result


def take_out(part, selector):
    """Remove a selector; what it fed is fed by what fed it, or by nothing."""
    links = links_of(part)
    entering = next((link for link in links if get(link, "target_id") == selector["id"]), None)
    leaving = [link for link in links if get(link, "origin_id") == selector["id"]]
    if entering:
        hand_over(part, entering, leaving, selector["outputs"][0].get("links") or [])
    else:
        cut(part, {get(link, "id") for link in leaving})
    gone = [entering] if entering else leaving
    part["links"] = [link for link in part["links"] if not any(link is one for one in gone)]
    part["nodes"].remove(selector)


def hand_over(part, entering, leaving, ids):
    """What a selector fed (links `leaving`, in the order `ids`) is fed by what the link `entering` came from."""
    origin, slot, gone = (get(entering, name) for name in ("origin_id", "origin_slot", "id"))
    for link in leaving:
        put(link, "origin_id", origin)
        put(link, "origin_slot", slot)
    for node in part["nodes"]:
        if node["id"] == origin:
            node["outputs"][slot]["links"] = spliced(node["outputs"][slot]["links"], gone, ids)
    if origin == BORDER[0]:
        part["inputs"][slot]["linkIds"] = spliced(part["inputs"][slot]["linkIds"], gone, ids)


def spliced(links, gone, ids):
    place = links.index(gone)
    return [*links[:place], *ids, *links[place + 1 :]]


def cut(part, gone):
    """Take links off the inputs that they fed."""
    for entry in (entry for node in part["nodes"] for entry in node.get("inputs") or []):
        if entry.get("link") in gone:
            entry["link"] = None
    for output in part.get("outputs") or []:
        output["linkIds"] = [link for link in output.get("linkIds") or [] if link not in gone]


def restore(data, users, scope, part, node):
    """Make a replaced node what it was, with the values, connections and place that it has now."""
    note = mark(node)
    before, row = note["replaced"], LOADERS[note["replaced"]["type"]]
    names = {new: old for old, new in row.names().items()}
    values = row.back(values_by_name(node, list(names)), values_of(before))
    change_inputs(part, node, restored_inputs(node, before, names))
    drawn = {name: node[name] for name in DRAWN if name in node and node[name] != note["drawn"][name]}
    now = {**copy.deepcopy(before), **drawn, "inputs": node["inputs"], "properties": restored_properties(node, before)}
    if before.get("widgets_values"):
        now["widgets_values"] = values if isinstance(before["widgets_values"], dict) else list(values.values())
    node.update(now)
    for name in {"inputs", "properties"} - set(before):
        if not node[name]:
            del node[name]
    rename_widgets(data, users, scope, node["id"], names)


def restored_properties(node, before):
    """The old properties; those that do not say which node it is with the values of now, and new ones behind them."""
    now = {name: value for name, value in node["properties"].items() if name not in OURS}
    return {**{name: now.get(name, value) for name, value in (before.get("properties") or {}).items()}, **now}


def restored_inputs(node, before, names):
    """The old slots with the connections of now. NotConvertible when one of the connections has no old slot."""
    inputs = {entry["name"]: copy.deepcopy(entry) for entry in before.get("inputs") or []}
    for entry in inputs.values():
        entry.update({"link": None} if "link" in entry else {})
    for entry in (entry for entry in node.get("inputs") or [] if entry.get("link") is not None):
        if entry["name"] not in names:
            raise NotConvertible(
                f"The input {entry['name']} of {node['type']} {node['id']} is connected, and {before['type']} has no "
                "such input. Disconnect it first."
            )
        inputs.setdefault(names[entry["name"]], renamed(entry, names))["link"] = entry["link"]
    return list(inputs.values())


def forget(data):
    """Remove the file's own note, and set the counters back where nothing was added since."""
    note = (data.get("extra") or {}).pop(MARK, None)
    if note is None:
        return
    for scope, part in scopes(data):
        before, after = note["counters"].get(scope, (None, None))
        if before and list(counter(part)) == after:
            set_counter(part, *before)
    if not data["extra"] and not note["had_extra"]:
        del data["extra"]
