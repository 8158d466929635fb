"""A workflow of ComfyUI -> the same with this pack's nodes, and back.

  workflow, report = convert(workflow, "auto")       # dict as JSON gives it; report: lines of text
  workflow, report = undo(workflow)                  # the loaders that were there before

Takes what ComfyUI's page saves, subgraphs and ComfyUI's own templates included, and API workflows. Loaders that are not
FLUX.2's stay, and the report says why. What cannot be converted raises NotConvertible with a sentence. The workflow
that is given stays as it is.
"""

import contextlib

from . import api_format, page_format
from .rules import LOADERS, OURS, NotConvertible, decide


@contextlib.contextmanager
def sound():
    """What breaks inside is the file's fault, and said in a sentence: files come from anywhere."""
    try:
        yield
    except NotConvertible:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise NotConvertible(
            f"This workflow is damaged or of a kind that is not known here ({type(error).__name__}: {error}). "
            "Open it in ComfyUI, save it, and convert what was saved."
        ) from error


def format_of(data):
    """The module that converts this kind of file."""
    for module in (page_format, api_format):
        if module.understands(data):
            return module
    raise NotConvertible(
        "This JSON is no ComfyUI workflow: expected was an object with nodes and links (what ComfyUI saves) "
        "or with nodes that have a class_type and inputs (what it exports for its API)."
    )


@sound()
def convert(data, backend="auto", wanted=()):
    """(converted workflow, [line of report]). NotConvertible when there is nothing to replace."""
    module = format_of(data)
    graph = module.graph(data)
    check_wanted(graph, wanted)
    plan = decide(graph, wanted)
    if not plan.replace and not plan.models:
        raise NotConvertible(nothing(graph, plan.left, module.converted(data)))
    result, selectors = module.convert(data, plan, backend)
    if not plan.replace and not selectors:
        raise NotConvertible(nothing(graph, plan.left, module.converted(data)))
    lines = [f"replaced {graph.nodes[key].label} by {row.new}" for key, row in plan.replace.items()]
    lines += [
        f"added Flux2SelectAttention {key[1]} with backend {backend}" + behind(graph, plan, loader)
        for key, loader in selectors
    ]
    return result, lines + [f"left {graph.nodes[key].label}: {why}" for key, why in plan.left.items()]


def behind(graph, plan, loader):
    """Which loader a selector stands behind, where that is not one of this pack's."""
    return "" if loader in plan.replace else f" behind {graph.nodes[loader].label}"


def check_wanted(graph, wanted):
    known = {str(key[1]) for key, node in graph.nodes.items() if node.type in LOADERS}
    if unknown := [identity for identity in wanted if identity not in known]:
        raise NotConvertible(
            f"There is no loader {', '.join(unknown)}. The loaders that can be replaced are: "
            f"{', '.join(sorted(known)) or 'none'}."
        )


def nothing(graph, left, converted):
    """The sentence for a workflow without anything to replace."""
    if converted or any(node.type in OURS for node in graph.nodes.values()):
        return "Nothing to replace: this workflow has the loaders of this pack already." + (
            " --undo goes back." if converted else ""
        )
    found = "; ".join(f"{graph.nodes[key].label}: {why}" for key, why in left.items())
    return f"Nothing to replace: expected were ComfyUI's loaders ({', '.join(LOADERS)}) of a FLUX.2 model. " + (
        f"Found: {found}. If one is FLUX.2's, say --node with its number."
        if found
        else "There are none in this workflow."
    )


@sound()
def undo(data):
    """(workflow as it was, [line of report]). NotConvertible when it was not converted."""
    module = format_of(data)
    if not module.converted(data):
        raise NotConvertible("Nothing to undo: this workflow carries no mark of a conversion.")
    return module.undo(data), ["went back to ComfyUI's own loaders"]
