"""From an error to the section of docs/troubleshooting.md that explains it.

  with links():                 # or @links()
      ...                       # what is raised in here says "More: <address>#section" below its sentence

An error keeps its type and traceback. It names its section itself (attention/errors.py): a class of errors has a
`topic`, `UserError(text, topic)` takes one. Memory that is short is known whoever says so. Other errors are left as
they are: they come from elsewhere.
"""

import contextlib
import functools
import inspect
import re
from pathlib import Path

from ..attention.errors import is_out_of_memory
from . import node_inputs

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/troubleshooting.md"
MORE = "More: "
PACKAGE, SHORT = __name__.rpartition(".flux2.")[0], "flux2_attention"
NODE_METHODS = ("execute", "validate_inputs")  # of a node class: what raises, or answers in a sentence

# sections of docs/troubleshooting.md that an error's `topic` names
SECTIONS = (
    "out-of-memory",
    "refused-call",
    "aiter-on-rocm",
    "quantised-backends",
    "backend-unavailable",
    "unknown-backend",
    "linked-values",
    "first-and-last-steps-and-blocks",
    "attention-of-the-text-encoder",
    "tokenizer",
    "prompt-of-another-text-encoder",
    "improving-prompts",
    "lora",
    "wrong-kind-of-file",
    "missing-file",
    "quantised-file",
    "several-gpus",
    "fast-blocks",
    "compiling",
    "update-comfyui",
    "prompts",
    "reference-images",
    "compare-and-benchmark",
    "damaged-file",
)


# --- addresses -------------------------------------------------------------------------------------------------------


@functools.cache
def repository():
    """The address of this pack's repository in pyproject.toml, or "" where it names none."""
    with contextlib.suppress(OSError):
        found = re.search(r'^Repository\s*=\s*"([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
        return found[1].rstrip("/").removesuffix(".git") if found else ""
    return ""


def address(section):
    """Where a section can be read: on the web, or in the pack's folder."""
    return (
        f"{repository()}/blob/main/{PAGE}#{section}" if repository() else f"{PAGE}#{section} in the folder of this pack"
    )


def section_of(error):
    """The section that explains an error, or None."""
    if is_out_of_memory(error) and not isinstance(error, KeyError):
        return "out-of-memory"
    topic = getattr(error, "topic", None)  # of our classes; others may mean something else by that word
    return topic if topic in SECTIONS else None


# --- sentences and errors --------------------------------------------------------------------------------------------


def bare(text):
    """A sentence without the line that `more` adds, for tables."""
    return "\n".join(line for line in text.split("\n") if not (line.startswith(MORE) and PAGE in line))


def link(error):
    """The same error, its text with the address of its section, once. Errors that make their text from fields get it as
    their `hint`. ComfyUI puts the module of an error in front of its text: of this pack that is the path of its folder,
    so the errors of the pack are called after the pack alone.
    """
    if type(error).__module__.startswith(f"{PACKAGE}."):
        type(error).__module__ = SHORT
    section = None if PAGE in str(error) else section_of(error)
    line = f"{MORE}{address(section)}" if section else ""
    if line and hasattr(error, "hint"):
        error.hint = f"{error.hint}\n{line}" if error.hint else line
    elif line and error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{line}", *error.args[1:])
    return error


def answer(error):
    """What validate_inputs returns for an error: its sentence with the address of its section."""
    return str(link(error))


@contextlib.contextmanager
def links():
    """Around code whose errors are shown to the user; also a decorator."""
    try:
        yield
    except Exception as error:
        link(error)
        raise


# --- nodes -----------------------------------------------------------------------------------------------------------


def linked(node):
    """A node class like `node` that checks its values when it runs, and whose errors name their section. What
    ComfyUI's base class does stays as it is.
    """
    base = node.GET_BASE_CLASS()
    own = {
        name: getattr(node, name).__func__
        for name in NODE_METHODS
        if getattr(node, name).__func__ is not getattr(base, name).__func__
    }
    if "execute" in own:
        own["execute"] = node_inputs.checking(node, own["execute"])
    methods = {name: classmethod(linking(function)) for name, function in own.items()}
    return type(
        node.__name__,
        (node,),
        {"__module__": node.__module__, "__qualname__": node.__qualname__, "__doc__": node.__doc__, **methods},
    )


def linking(function):
    """A function like `function`, with its signature: ComfyUI reads it to know what to hand over."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapped(*args, **kwargs):
            with links():
                return await function(*args, **kwargs)
    else:

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with links():
                return function(*args, **kwargs)

    wrapped.__signature__ = inspect.signature(function)
    return wrapped
