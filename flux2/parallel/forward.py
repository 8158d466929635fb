"""A forward pass of FLUX.2 sharded over several ranks, through ComfyUI's patch points.

Every rank calls the same diffusion model with the same inputs. What happens then: `forward_orig`, replaced for the
call, sees the arguments; a `post_input` patch, run after everybody else's, keeps this rank's tokens of the text, the
image and the references together with their position ids, so that everything that works on single tokens is done once
in all, position embedding included; the attention override exchanges heads and tokens (attention.py); what
`forward_orig` returns is gathered, so every rank returns the whole. The blocks, patches that replace blocks and the
attention backend do not know.

Core facts this rests on (ComfyUI 0.30, comfy/ldm/flux/model.py): post_input patches run after img_in and txt_in, before
the position embedding and the slices for index_timestep_zero are made, with the transformer_options that the blocks
get; the slices are a list that is read after the patches; `control` is added to the first tokens of the image.
"""

from contextlib import contextmanager, nullcontext
import inspect
import traceback

import torch

from comfy.patcher_extension import WrappersMP

from ...attention.errors import UserError, explained
from ...attention.parallel import usp
from . import tensor_parallel
from ..attention_slot import SLOT, with_choices_of_blocks
from .attention import ShardedAttention
from .shards import TokenShards

KEY = "flux2_sharded"
ATTRIBUTES = ("forward_orig", "double_blocks", "single_blocks", "num_heads", "hidden_size", "out_channels")
NEEDED = ("img", "img_ids", "txt", "txt_ids", "transformer_options")
REFERENCES = "reference_image_num_tokens"
ATTENTION, IMAGE, TEXT, BOTH = "attention", "image", "text", "both"  # what is exchanged; the tokens that are added


def unsupported(network, ulysses=1):
    """Sentences why the forward passes of a diffusion model cannot be sharded with this Ulysses degree; empty means
    they can.
    """
    missing = [name for name in ATTRIBUTES if not hasattr(network, name)]
    missing += [name for name in NEEDED if not missing and name not in parameters(network.forward_orig)]
    if missing:
        return [
            f"Several GPUs can share models of FLUX.2's shape; this one ({type(network).__name__}) lacks "
            f"{', '.join(missing)}."
        ]
    if network.num_heads % ulysses:
        return [f"Ulysses degree {ulysses} does not divide the {network.num_heads} attention heads of this model."]
    return []


def parameters(function):
    return list(inspect.signature(function).parameters)


@contextmanager
def sharded_forward(network, mesh, transformer_options=None, *, fallback=None, failed=lambda error: None):
    """Around ONE call of a diffusion model, which every rank of `mesh` (attention.parallel.Mesh) makes with the same
    inputs:

      with sharded_forward(network, mesh, transformer_options) as options:
          network(x, timestep, context, ..., transformer_options=options)

    While the block runs, `forward_orig` of this network is a ShardedForward; afterwards it is what it was. The options
    are passed on as they are: who holds the attention slot and which post_input patches there are is looked up inside,
    so they may still change on the way. fallback: an AttentionOverride, used when the slot is empty and a ring degree
    above 1 needs a log-sum-exp. failed(error): called as soon as something raises on this rank, before it takes part
    in what is left of the pass; once or twice. ValueError when the network cannot be sharded.
    """
    reasons = unsupported(network, mesh.ulysses * mesh.tensor)
    parallel = tensor_parallel.of(network)
    if mesh.tensor != (parallel.size if parallel else 1):
        reasons.append(f"The weights are not split into the {mesh.tensor} parts that these GPUs hold.")
    if reasons:
        raise UserError(" ".join(reasons), "several-gpus")
    held = network.__dict__.get("forward_orig")  # an object patch of somebody else lies in the instance
    network.forward_orig = ShardedForward(network, mesh, fallback, failed)
    try:
        with parallel.over(mesh) if parallel else nullcontext():
            yield transformer_options
    finally:
        del network.forward_orig
        if held is not None:
            network.forward_orig = held


def shard(model, mesh, *, fallback=None):
    """Shard every forward pass of a MODEL clone: for programs in which each rank runs the whole sampling itself. Doing
    it twice replaces.
    """
    reasons = unsupported(model.model.diffusion_model, mesh.ulysses * mesh.tensor)
    if reasons:
        raise UserError(" ".join(reasons), "several-gpus")

    def wrapper(executor, *args, **kwargs):
        with sharded_forward(executor.class_obj, mesh, fallback=fallback):
            return executor(*args, **kwargs)

    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper)


class ShardedForward:
    """Takes the place of forward_orig for one call. inner: what is called in it; collectives: what one pass exchanges,
    as far as is known, in order: ATTENTION, or the tokens whose products are added over the parts of the weights.
    """

    def __init__(self, network, mesh, fallback=None, failed=lambda error: None):
        self.inner, self.mesh, self.fallback, self.failed = network.forward_orig, mesh, fallback, failed
        self.network = network
        self.names = parameters(self.inner)
        # of each process, where weights are split
        self.heads, self.head_dim = network.num_heads // mesh.tensor, network.hidden_size // network.num_heads
        self.hidden, self.out_channels = network.hidden_size, network.out_channels
        split = mesh.tensor > 1
        double = [ATTENTION, *[IMAGE, IMAGE, TEXT, TEXT] * split] * len(network.double_blocks)
        self.collectives = [*double, *[ATTENTION, *[BOTH] * split] * len(network.single_blocks)]
        self.calls = self.collectives.count(ATTENTION)

    def __call__(self, *args, **kwargs):
        """The whole output (B, S of the image, C), on every rank. An exception on one rank does not leave the others
        waiting: this rank takes part in the collectives that are left, with zeros, and raises then. (RanksLost and
        Interrupted raise at once.)
        """
        state = ForwardState(self, {**dict(zip(self.names, args)), **kwargs})
        try:
            with self.mesh.stats.forward():
                return state.gather_output(self._call(state))
        except BaseException as error:  # ComfyUI's cancel comes out of any linear layer, and is no Exception
            state.drain(error)
            raise

    def _call(self, state):
        try:
            return self.inner(**state.arguments())
        except BaseException as error:
            # they hold the pass's tensors, and what went wrong may be that memory is short
            traceback.clear_frames(error.__traceback__)
            self.failed(error)
            raise


class ForwardState:
    """One forward pass on one rank. shards: whose tokens are whose, known once the inputs are cut; pending: the last
    attention call; finished: whether the output is gathered.
    """

    def __init__(self, sharded, named):
        self.sharded, self.mesh, self.named = sharded, sharded.mesh, named
        self.options, self.shards = named["transformer_options"], None
        self.calls_before, self.additions_before = self.mesh.attention_calls, self.mesh.additions
        self.pending, self.finished = None, False
        self.zero_slices = None if named.get("timestep_zero_index") is None else list(named["timestep_zero_index"])
        self.control = None if named.get("control") is None else dict(named["control"])

    def arguments(self):
        """What forward_orig is called with: the same, our patch behind the other post_input patches, the sharded
        attention around the override that is in the slot.
        """
        options = dict(with_choices_of_blocks(self.sharded.network, self.options))
        patches = dict(options.get("patches", {}))
        options["patches"] = {**patches, "post_input": [*patches.get("post_input", []), self.shard_inputs]}
        options[SLOT] = ShardedAttention(self, options.get(SLOT), self.sharded.fallback)
        changed = {"transformer_options": options, "timestep_zero_index": self.zero_slices, "control": self.control}
        return {
            **self.named,
            **{name: value for name, value in changed.items() if name in self.named or name == "transformer_options"},
        }

    def shards_for(self, text, image, ids, options):
        """The TokenShards for so many tokens. ids: positions in the image stream, with those of references that come
        from a cache and are not in it. ValueError when these tokens cannot be shared.
        """
        references = sum(options.get(REFERENCES, ())) or sum(end - begin for begin, end in self.zero_slices or ())
        if self.zero_slices not in (None, [], [[ids - references, ids]]):
            raise UserError(
                f"Tokens {self.zero_slices} of {ids} are at another timestep; several GPUs can share that only for "
                "the reference images, at the end.",
                "several-gpus",
            )
        if image not in (ids, ids - references):
            raise UserError(
                f"The image has {image} tokens and {ids} positions, {references} of them of reference images: another "
                "patch changed it in a way that several GPUs cannot share.",
                "several-gpus",
            )
        return TokenShards.of(text, ids - references, references, self.mesh.size, attended=image == ids)

    def shard_inputs(self, inputs):
        """The post_input patch: this rank's part of img, txt (B, S, C), img_ids, txt_ids (B, S, axes)."""
        # the options that the blocks get
        img, txt, ids, options = inputs["img"], inputs["txt"], inputs["img_ids"], inputs["transformer_options"]
        rank, shards = self.mesh.rank, self.shards_for(txt.shape[1], img.shape[1], ids.shape[1], options)
        self.shards = shards
        self.mesh.stats.set_tokens(shards.lengths())
        # what speaks of token positions beside the tokens: core reads all of it after the patches
        begin, end = shards.image[rank]
        referenced = shards.references[rank][1] - shards.references[rank][0]
        if options.get(REFERENCES):
            options[REFERENCES] = [referenced]
        if self.zero_slices is not None:
            self.zero_slices[:] = [[end - begin, end - begin + referenced]]
        if self.control is not None:
            for side, adds in self.control.items():
                self.control[side] = [shard_control(add, shards, rank) for add in adds]
        text = slice(*shards.text[rank])
        return {
            **inputs,
            "img": select_ranges(img, shards.image_ranges(rank)),
            "img_ids": select_ranges(ids, shards.image_ranges(rank, references=True)),
            "txt": txt[:, text].contiguous(),
            "txt_ids": inputs["txt_ids"][:, text],
        }

    def gather_output(self, out):
        """What forward_orig returns on one GPU, from this rank's part (B, S, C): the image's tokens of all ranks, then
        those of the references.
        """
        if self.shards is None:
            raise explained(
                RuntimeError(
                    "This version of ComfyUI runs no post_input patches for this model, so several GPUs cannot share "
                    "it."
                ),
                "several-gpus",
            )
        made, calls = self.mesh.attention_calls - self.calls_before, self.sharded.calls
        if made != calls and self.mesh.everybody is not None:  # the other ranks are in another collective than this one
            raise explained(
                RuntimeError(
                    f"In this pass attention was called {made} times, and the blocks of this model call it {calls} "
                    "times: another node skips or repeats blocks, and the other GPUs do not know. Remove that node, "
                    "or set gpus to 1."
                ),
                "several-gpus",
            )
        whole = self.mesh.gather(out, self.shards.image_lengths())
        self.finished = True
        if not self.shards.attended or not self.shards.references[-1][1]:
            return whole
        pieces = whole.split(
            [end - begin for rank in range(self.mesh.size) for begin, end in self.shards.image_ranges(rank)], dim=1
        )
        return torch.cat([*pieces[::2], *pieces[1::2]], dim=1)

    def drain(self, error):
        """Take part in what is left of this pass, so that the other ranks come to its end. What this rank sends is
        worthless; NaN in the output shows it.
        """
        mesh = self.mesh
        if mesh.everybody is None or mesh.broken is not None or self.finished:
            return
        try:
            if self.shards is None and not self._shard_zeros():
                return  # these inputs cannot be shared: every rank says so, and none waits
            if self.pending and not self.pending.finished:
                self.pending.drain(error)
            self._exchange_nothing()
        except Exception as another:
            mesh.broken = mesh.broken or another

    def _shard_zeros(self):
        """Find the shards as the other ranks do: by the other patches, which may change the lengths, and ours; on
        zeros. False when there are none.
        """
        width = self.sharded.hidden
        inputs = {name: self.named[name].new_zeros((*self.named[name].shape[:2], width)) for name in ("img", "txt")}
        inputs |= {name: self.named[name] for name in ("img_ids", "txt_ids")}
        inputs["transformer_options"] = dict(self.options)
        for patch in self.options.get("patches", {}).get("post_input", ()):
            inputs = patch(inputs)
        try:
            self.shard_inputs(inputs)
        except ValueError:
            return False
        return True

    def _exchange_nothing(self):
        """The collectives of this pass that are left, in their order, and the gathering of its output. NaN wherever it
        reaches the output of other ranks.
        """
        img, mesh, sharded, shards = self.named["img"], self.mesh, self.sharded, self.shards
        lengths, keys = shards.lengths(), shards.lengths(references=True)
        tokens = {IMAGE: shards.image_lengths(), TEXT: shards.text_lengths(), BOTH: lengths}
        shape = (sharded.heads, sharded.head_dim)
        q, k = (img.new_zeros((img.shape[0], of[mesh.rank], *shape)) for of in (lengths, keys))
        done = mesh.attention_calls - self.calls_before + mesh.additions - self.additions_before
        for what in sharded.collectives[done:]:
            if what == ATTENTION:
                usp.attend(no_attention, q, k, k, mesh, lengths, kv_lengths=keys)
            else:
                mesh.add(img.new_full((img.shape[0], tokens[what][mesh.rank], sharded.hidden), float("nan")))
        own = shards.image_lengths()[mesh.rank]
        mesh.gather(img.new_full((img.shape[0], own, sharded.out_channels), float("nan")), shards.image_lengths())


def no_attention(q, k, v, *, mask, scale, need_lse):
    """Attention that computes nothing, in the shapes of one that does."""
    return q, q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def select_ranges(tensor, ranges):
    """Some of the tokens of a tensor (B, S, ...): ranges of (begin, end), one after the other."""
    return torch.cat([tensor[:, begin:end] for begin, end in ranges], dim=1)


def shard_control(add, shards, rank):
    """This rank's part of a control network's addition to the first tokens of the image stream (B, S, C), or None."""
    if add is None:
        return None
    ranges = shards.image_ranges(rank)
    return select_ranges(add, [(min(begin, add.shape[1]), min(end, add.shape[1])) for begin, end in ranges])
