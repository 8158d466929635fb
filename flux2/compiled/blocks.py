"""FLUX's blocks compiled one by one with torch.compile, on a MODEL clone: one graph for all double blocks, one for all
single blocks, any length.

While such a model runs, each block's `forward` is a Runner, so whoever calls core's block calls compiled code; the
modules are as before when the forward pass ends. Blocks that another node replaces without calling core's are left to
it. The length of text and picture is free in the graphs; batch one, larger batches, references at timestep zero and
other ways of keeping weights each need a graph of their own, once. No guard is dropped: what varies between blocks,
backends and samplings is outside the graphs (graph_ops.py). Not covered: training, CUDA graphs.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
import logging
import time
import traceback
from weakref import WeakKeyDictionary

import torch

import comfy.ldm.flux.model
import comfy.model_management
from comfy.patcher_extension import WrappersMP

from ...attention.errors import Explained, UserError
from . import toolchain, graph_ops
from .. import error_links
from ..fused.blocks import FusedBlock, fusing_of, own_choice
from ..module_forward import forwards_as

KEY = "flux2_compile"
MODES = ("default", "max-autotune-no-cudagraphs")
REFUSE, EAGER = "error", "run eager and report"
# of one kind of block, before torch.compile gives up: batches x ways of keeping weights x models of one session
GRAPHS = 64
INSTEAD = "Remove the node: ComfyUI's blocks run without it. Fast Blocks (FLUX.2) needs no compiling."
log = logging.getLogger(__name__)


class CompileRefused(Explained, RuntimeError):
    """Blocks cannot be compiled. The text is a sentence for the user: why, and what to do."""

    topic = "compiling"


# --- a plan, and the record of what came of it -----------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """One compilation: the kind of block, seconds it took, what it is for in words, and whether its code was found on
    disk.
    """

    kind: str
    seconds: float
    described: str
    found: bool


class CompileLog:
    """What was compiled since the node ran, and how the block calls of the current sampling were computed."""

    def __init__(self):
        self.graphs = []
        self.begin()

    def begin(self):
        self.compiled, self.eager = Counter(), Counter()

    @property
    def seconds(self):
        return sum(graph.seconds for graph in self.graphs)

    def headline(self):
        number, found = len(self.graphs), sum(graph.found for graph in self.graphs)
        return (
            f"{number} graph{'s' if number != 1 else ''} compiled in {self.seconds:.1f} s since the node ran, "
            f"{found} of them found on disk"
        )

    def as_text(self):
        done, left = sum(self.compiled.values()), sum(self.eager.values())
        counted = (
            f"{done} of {done + left} block calls." if done + left else "no block of ComfyUI's own has been called."
        )
        lines = [f"Compiled blocks: {counted}"]
        if self.graphs:
            lines.append(f"  {self.headline()} ({toolchain.place()}):")
            lines += [f"    {graph.kind} blocks, {graph.described}: {graph.seconds:.1f} s" for graph in self.graphs]
        return "\n".join(
            lines + [f"  run eager, {count} calls: {reason}" for reason, count in self.eager.most_common()]
        )

    def as_data(self):
        return {
            "compiled": sum(self.compiled.values()),
            "eager": dict(self.eager),
            "seconds": self.seconds,
            "graphs": [{"kind": g.kind, "seconds": g.seconds, "for": g.described} for g in self.graphs],
        }


class CompilePlan:
    """How the blocks of a MODEL are compiled. mode and backend: torch.compile's. on_failure: REFUSE raises
    CompileRefused where a block cannot be compiled, EAGER runs it eager and says so in the log. tell(sentence) is
    called around each compilation.
    """

    def __init__(self, mode=MODES[0], on_failure=REFUSE, backend="inductor", tell=lambda text: None):
        if mode not in MODES or on_failure not in (REFUSE, EAGER):
            raise UserError(
                f"The mode can be {' or '.join(MODES)}, and failures can be answered by '{REFUSE}' or '{EAGER}'; "
                f"not '{mode}' and '{on_failure}'.",
                "compiling",
            )
        self.mode, self.on_failure, self.backend, self.tell = mode, on_failure, backend, tell
        self.log, self.failed = CompileLog(), {}

    def run(self, kind, block, options, args, kwargs, described):
        """One call of a block by compiled code. kind: "double" or "single"; described: what the graph is for, in words.
        The block's errors pass through.
        """
        if not any(graph.kind == kind for graph in self.log.graphs):
            self.tell(f"Compiling {kind} blocks ...")
        function, before, hits, start = (
            compiled(kind, self.mode, self.backend),
            graphs_so_far(),
            found_on_disk(),
            time.perf_counter(),
        )
        out = function(block, options, args, kwargs)
        if graphs_so_far() != before:
            self.log.graphs.append(Graph(kind, time.perf_counter() - start, described, found_on_disk() > hits))
            self.tell(self.log.headline())
            log.info("Compile Blocks: %s blocks, %s, in %.1f s.", kind, described, self.log.graphs[-1].seconds)
        self.log.compiled[kind] += 1
        return out

    def fail(self, kind, error):
        """Remember why a kind of block cannot be compiled, so that it is tried once. CompileRefused where that shall
        stop the run.
        """
        reason = f"torch.compile failed on the {kind} blocks: {summary(error)}"
        if self.on_failure == REFUSE:
            raise CompileRefused(f"{reason} Set 'if compiling fails' to '{EAGER}'. {INSTEAD}") from error
        log.warning("Compile Blocks: %s They run eager.", reason)
        self.failed[kind] = reason


def summary(error):
    """The first two lines of a compiler's error: what failed, and why."""
    text = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2]) or type(error).__name__
    return text if text.endswith(".") else text + "."


def dynamo():
    """torch._dynamo, which takes a second to import."""
    import torch._dynamo

    return torch._dynamo


@lru_cache(maxsize=None)
def set_up():
    """torch.compile's settings for the whole process, made once: passes may run side by side (ComfyUI's MultiGPU), so
    nothing is changed around one of them.
    """
    from torch.fx.experimental import _config as symbols

    config = dynamo().config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # PyTorch 2.6's name
    setattr(config, limit, max(GRAPHS, getattr(config, limit)))
    symbols.use_duck_shape = False  # two lengths that happen to be equal stay two lengths


def gave_up(error):
    """Whether an error says that torch.compile gave up on a block, which has computed nothing then: one of its own, or
    anything that was raised while it compiled, such as a full disk.
    """
    return type(error).__module__.startswith("torch._dynamo.") or went_through(error, dynamo().convert_frame)


def compiled_code_failed(error):
    """Whether generated code failed to start, such as a Triton kernel that wants more shared memory than there is.
    Parts of the block may have been computed then, in place, so it cannot be run eager after all.
    """
    generated = type(error).__module__.startswith(("torch._inductor.", "triton."))
    return generated and not gave_up(error) and not went_through(error, graph_ops)


def went_through(error, module):
    """Whether functions of a module are on an error's traceback."""
    return any(frame.f_code.co_filename == module.__file__ for frame, _ in traceback.walk_tb(error.__traceback__))


def graphs_so_far():
    """How many graphs this process has compiled."""
    return dynamo().utils.counters["stats"]["unique_graphs"]


def found_on_disk():
    """How many graphs' code this process has read from torch's cache."""
    return dynamo().utils.counters["inductor"]["fxgraph_cache_hit"]


# Two functions, because torch keeps what it compiled with the code of a function, and looks through all of it at every
# call.


def _double(block, options, args, kwargs):
    return type(block).forward(block, *args, transformer_options=options, **kwargs)


def _single(block, options, args, kwargs):
    return type(block).forward(block, *args, transformer_options=options, **kwargs)


@lru_cache(maxsize=None)
def compiled(kind, mode, backend):
    """The function of a kind of block, under torch.compile with free lengths and without graph breaks."""
    function = {"double": _double, "single": _single}[kind]
    return torch.compile(
        function, backend=backend, fullgraph=True, dynamic=True, mode=None if mode == MODES[0] else mode
    )


# --- one block -------------------------------------------------------------------------------------------------------


class Runner:
    """What a block's `forward` is while its model runs. layers: [(place, layer)] of the block that have weights."""

    def __init__(self, plan, kind, block, layers):
        self.plan, self.kind, self.block, self.layers = plan, kind, block, layers
        self.eager, self.foreign = block.forward, getattr(block.forward, "__func__", None) is not type(block).forward

    def __call__(self, *args, transformer_options={}, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()  # the layers of a graph do not look
        like = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        reason = self.plan.failed.get(self.kind) or self.uncompilable(like, transformer_options)
        if reason is None:
            try:
                return self.run(like, transformer_options, args, kwargs)
            except Exception as error:
                if compiled_code_failed(error):
                    raise CompileRefused(f"What was compiled cannot run here: {summary(error)} {INSTEAD}") from error
                if not gave_up(error):  # the block's own: a cancel, out of memory, an attention backend that refuses
                    raise
                self.plan.fail(self.kind, error)
                reason = self.plan.failed[self.kind]
        self.plan.log.eager[reason] += 1
        return self.eager(*args, transformer_options=transformer_options, **kwargs)

    def uncompilable(self, like, options):
        """Why one call of the block runs eager, as a sentence; None when it can be compiled."""
        if torch.is_grad_enabled() and like.requires_grad:
            return "a gradient is asked for."
        patches = sorted(names_read(type(self.block)) & set(options.get("patches", {})))
        if patches:
            return (
                f"another node patches the blocks from inside ({', '.join(patches)}), with code that may differ "
                "from call to call."
            )
        return "another pack has put a function of its own in the place of the block's." if self.foreign else None

    def run(self, like, options, args, kwargs):
        read = {
            name: value for name, value in options.items() if name in names_read(type(self.block)) and name != "patches"
        }
        with (
            graph_ops.inside(options, dict(self.layers), own_choice(self.block)),
            graph_ops.stand_ins(self.block, self.layers, like) as number,
        ):
            outside = f", {number} of {len(self.layers)} layers called outside the graph" if number else ""
            described = f"batch {like.shape[0]}, {str(like.dtype).removeprefix('torch.')}{outside}"
            return self.plan.run(
                self.kind,
                self.block,
                {**read, "optimized_attention_override": graph_ops.attention},
                args,
                kwargs,
                described,
            )


@lru_cache(maxsize=None)
def names_read(block_type):
    """The strings in the code of a block's forward, among them the names of all options that it reads: ComfyUI lists
    those nowhere, and one that is not handed on would be missed in silence. Options with other names differ from block
    to block and step to step, and cannot matter to it.
    """
    return frozenset(value for value in block_type.forward.__code__.co_consts if isinstance(value, str))


# --- a model ---------------------------------------------------------------------------------------------------------


class Compiling:
    """The wrapper around a forward pass of a FLUX network, whichever copy of it runs: its blocks are Runners
    meanwhile.
    """

    def __init__(self, plan):
        self.plan, self.layers = plan, WeakKeyDictionary()

    def __call__(self, executor, *args, **kwargs):
        if torch.compiler.is_compiling():  # core's compile node around us compiles everything anyway
            return executor(*args, **kwargs)
        network = executor.class_obj
        runners = {
            block: Runner(self.plan, kind, block, self.layers_of(block))
            for kind in ("double", "single")
            for block in getattr(network, f"{kind}_blocks")
            if not isinstance(block.forward, FusedBlock)  # Fast Blocks compute those
        }
        with forwards_as(runners):
            return executor(*args, **kwargs)

    def layers_of(self, block):
        """[(place, layer)] of the layers with weights in a block."""
        if block not in self.layers:
            self.layers[block] = [
                (name, layer) for name, layer in block.named_modules() if getattr(layer, "weight", None) is not None
            ]
        return self.layers[block]


def install(model, plan):
    """Compile the blocks of a MODEL clone by a CompilePlan, from its next forward pass on; replaces an earlier plan.
    ValueError for models of another kind.
    """
    set_up()
    network = model.model.diffusion_model
    if not isinstance(network, comfy.ldm.flux.model.Flux):
        raise UserError(
            f"Compile Blocks knows the blocks of FLUX models, and this is a {type(model.model).__name__}. "
            "ComfyUI's own node TorchCompileModel compiles any model.",
            "compiling",
        )
    for kind, wrapper in ((WrappersMP.DIFFUSION_MODEL, Compiling(plan)), (WrappersMP.OUTER_SAMPLE, counting(plan.log))):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)


def counting(compile_log):
    """A sampler wrapper: a sampling begins with no calls counted."""

    @error_links.links()
    def wrapper(executor, *args, **kwargs):
        compile_log.begin()
        return executor(*args, **kwargs)

    return wrapper


def plan_of(model):
    """The CompilePlan of a MODEL, or None."""
    found = model.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).get(KEY)
    return found[0].plan if found else None


def replaced(model):
    """{kind: number of its blocks that other nodes replace}: those are compiled only where the replacement calls core's
    block.
    """
    entries = model.model_options.get("transformer_options", {}).get("patches_replace", {}).get("dit", {})
    return Counter(
        name[0].removesuffix("_block")
        for name in entries
        if isinstance(name, tuple) and str(name[0]) in ("double_block", "single_block")
    )


def report(model):
    """What compiling did for a MODEL, as text; "" without a plan."""
    plan = plan_of(model)
    if plan is None:
        return ""
    taken = ", ".join(f"{count} {kind}" for kind, count in replaced(model).items())
    notes = [f"{taken} blocks are replaced by another node: they are compiled only where it calls ComfyUI's block."]
    notes = notes if taken else []
    if fusing_of(model) and not fusing_of(model).left:
        notes.append("Fast Blocks (FLUX.2) computes the blocks: none of those is compiled.")
    return "\n  ".join([plan.log.as_text(), *notes])
