"""From an error to the section of docs/troubleshooting.md that explains it.

  with links():                 # or @links()
      ...                       # what is raised in here says "More: <address>#section" below its sentence

An error keeps its type and traceback. TOPICS decides by the sentence, so raising stays plain: a new kind of sentence is
a row here and a section there. Knows nothing of attention or ComfyUI. Errors that no row knows are left as they are:
they come from elsewhere.
"""

import contextlib
import functools
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/troubleshooting.md"
MORE = "More: "
PACKAGE, SHORT = __name__.rpartition(".flux2.")[0], "flux2_attention"
NODE_METHODS = ("execute", "validate_inputs")  # of a node class: what raises, or answers in a sentence

# (section, what its sentences contain); the first row that matches decides
TOPICS = tuple(
    (section, re.compile("|".join(parts), re.S))
    for section, *parts in (
        ("out-of-memory", r"out of memory", r"OutOfMemoryError", r"can't allocate memory"),
        ("refused-call", r"cannot run for this call.*Choose another backend"),
        ("aiter-on-rocm", r"Attention backend 'aiter", r"has no FlyDSL kernel for this call"),
        ("quantised-backends", r"Attention backend '(sage|comfy-int8|cudnn-fp8)"),
        ("backend-unavailable", r"Attention backend '[^']*' cannot run"),
        ("unknown-backend", r"There is no attention backend", r"AITER's rounding can be", r"unsupported calls can be"),
        (
            "first-and-last-steps-and-blocks",
            r"First and last steps and blocks",
            r"first and last blocks cannot be chosen",
        ),
        ("attention-of-the-text-encoder", r"The attention of this text encoder .* cannot be chosen"),
        ("tokenizer", r"without its tokenizer", r"The tokenizer in .* cannot be read"),
        ("prompt-of-another-text-encoder", r"reads prompts \d+ wide"),
        (
            "improving-prompts",
            r"can read prompts but not write",
            r"prompts are improved by Mistral",
            r"has no vision tower",
            r"not from Load FLUX\.2 Text Encoder",
            r"only writing needs",
            r"weights that writing needs",
            r"has no Mistral 3 that can be used",
            r"There is nothing to improve",
            r"Mistral wrote nothing",
            r"Temperature .* cannot be used",
        ),
        (
            "lora",
            r"is a LoRA for",
            r"is no LoRA:",
            r"Load FLUX\.2 LoRA expects",
            r"layers was applied",
            r"changes the text encoder alone",
            r"the alphas in its metadata",
        ),
        (
            "wrong-kind-of-file",
            r" expects .*, from the folder",
            r"FLUX\.2 reads the hidden state after layer",
            r"not the text encoder of a FLUX\.2 model",
        ),
        (
            "missing-file",
            r"There is no .* in the model folder",
            r"There is no model folder",
            r"is a link that points nowhere",
            r"does not exist\. Choose a file",
            r"is missing from the folder",
            r"holds no \.safetensors file",
            r"no index that joins",
            r"is one of \d+ shards",
        ),
        ("quantised-file", r"ComfyUI does not read that: use the bf16 file", r"is already quantised"),
        (
            "several-gpus",
            r"\b(Refused|NotReplicable|RanksFailed|RanksLost): ",
            r"Sequence parallel",
            r"GPUs were asked for",
            r"What works for \d+ GPUs",
            r"[Ss]everal GPUs",
            r"GPUs cannot share",
            r"[Uu]lysses degree",
            r"[Rr]ing degree",
            r"process groups were ended",
            r"address of this machine and a port",
            r"other hosts may join",
            r"There is no ComfyUI on",
            r"In this pass attention was called",
        ),
        ("fast-blocks", r"Fast Blocks cannot", r"blocks can be fused", r"VAE's fused blocks cannot"),
        ("compiling", r"CompileRefused", r"Compile Blocks", r"torch\.compile failed", r"The mode can be"),
        ("update-comfyui", r"ComfyUI does not recognise .*Update ComfyUI"),
        (
            "prompts",
            r"There is no prompt to encode",
            r"The prompt file .* (cannot be read|is larger than|is not UTF-8)",
            r"A prompt must be text",
            r"The prompt contains the name of a special token",
            r"There is no CLIP",
        ),
        ("reference-images", r"There are \d+ reference images", r"Reference image \d+ cannot be read"),
        (
            "compare-and-benchmark",
            r"so there is nothing to compare with",
            r"Connect either positive",
            r"This compares pictures",
            r"is not a size",
            r"There is no size to measure",
            r"does not say how wide its prompts are",
        ),
        ("damaged-file", r"CheckpointError", r"[Dd]ownload it again"),
    )
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


def section_of(text):
    """The section that explains a sentence, or None."""
    return next((section for section, pattern in TOPICS if pattern.search(text)), None)


# --- sentences and errors --------------------------------------------------------------------------------------------


def more(text, kind=""):
    """A sentence with the address of its section below it, once; unchanged when there is none. kind: the name of the
    error's type.
    """
    section = None if PAGE in text else section_of(f"{kind}: {text}")
    return f"{text}\n{MORE}{address(section)}" if section else text


def bare(text):
    """A sentence without the line that `more` adds, for tables."""
    return "\n".join(line for line in text.split("\n") if not (line.startswith(MORE) and PAGE in line))


def link(error):
    """The same error, its text with the address of its section. Errors that make their text from fields get it as their
    `hint`. ComfyUI puts the module of an error in front of its text: of this pack that is the path of its folder, so
    the errors of the pack are called after the pack alone.
    """
    if type(error).__module__.startswith(f"{PACKAGE}."):
        type(error).__module__ = SHORT
    line = more(str(error), type(error).__name__)[len(str(error)) + 1 :]
    if line and hasattr(error, "hint"):
        error.hint = f"{error.hint}\n{line}" if error.hint else line
    elif line and error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{line}", *error.args[1:])
    return error


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
    """A node class like `node` whose errors, and whose answers to wrong inputs, name their section. What ComfyUI's base
    class does stays as it is.
    """
    base = node.GET_BASE_CLASS()
    own = {
        name: getattr(node, name).__func__
        for name in NODE_METHODS
        if getattr(node, name).__func__ is not getattr(base, name).__func__
    }
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
                return _with_link(await function(*args, **kwargs))
    else:

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with links():
                return _with_link(function(*args, **kwargs))

    wrapped.__signature__ = inspect.signature(function)
    return wrapped


def _with_link(answer):
    return more(answer) if isinstance(answer, str) else answer
