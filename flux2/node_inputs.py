"""What reaches a node when it runs, checked against the node's own schema.

  execute = checking(node, execute)       # UserError, in a sentence, for the first value that does not fit

ComfyUI checks the constants of a prompt against a schema, and of a link only which type the other node claims to give.
Nodes of other packs claim any type, and give None, numbers as text, or images with no pixel. Which files and kernels
there are is not judged here: a node that has a validator for an input says that itself.
"""

import functools
import inspect
import math
import operator

import torch

from ..attention.errors import UserError

TOPIC = "linked-values"
MOST_IMAGES = 2**16  # in a batch that a latent says it was cut from
SHOWN = 60  # characters of a wrong value in a sentence


def checking(node, execute):
    """A node's `execute` that checks its values first. ComfyUI hands them over by name."""

    @functools.wraps(execute)
    def wrapped(cls, *args, **values):
        return execute(cls, *args, **{name: fitted(node, name, value) for name, value in values.items()})

    return wrapped


@functools.cache
def schema_of(node):
    """(display name, {id: input}, names that the node's own validator judges)."""
    schema = node.define_schema()
    return (
        schema.display_name,
        {item.id: item for item in schema.inputs},
        set(inspect.signature(node.validate_inputs).parameters),
    )


def fitted(node, name, value):
    """One value as the input takes it: whole numbers as int. UserError when it does not fit."""
    title, inputs, judged = schema_of(node)
    item = inputs.get(name)
    if item is None or (item.io_type in SOCKETS and item.optional and value is None):
        return value
    if item.io_type in SOCKETS:
        takes, fits = SOCKETS[item.io_type]
        fits = fits(value)
    else:
        takes, value, fits = CONSTANTS[item.io_type](item, value, name in judged)
    if not fits:
        raise UserError(
            f'{title}: the input "{item.display_name or name}" takes {takes}. It was given {shown(value)}. Look at '
            "what the node that is connected there gives out.",
            TOPIC,
        )
    return value


def shown(value):
    """A value as a sentence can show it: short, on one line, printable."""
    if torch.is_tensor(value):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a tensor of shape {list(value.shape)}, {kind}, on {value.device}"
    if value is None or isinstance(value, (bool, int, float, str)):
        try:
            text = ascii(value)
        except ValueError:  # an int of more digits than Python prints
            text = "a number with thousands of digits"
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
    return f"a value of type {type(value).__name__}"


# --- constants: (what the input takes, the value, whether it fits) ---------------------------------------------------


def whole_number(item, value, judged):
    found = value
    try:
        found = int(value) if isinstance(value, float) and value == int(value) else operator.index(value)
        fits = item.min is None or item.min <= found
        fits = fits and (item.max is None or found <= item.max)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: tensors of several numbers
        fits = False
    return f"a whole number{limits(item)}", found if fits else value, fits


def number(item, value, judged):
    found = value
    try:
        found = float(value) if not isinstance(value, str) else math.nan
        fits = math.isfinite(found) and (item.min is None or item.min <= found)
        fits = fits and (item.max is None or found <= item.max)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fits = False
    return f"a number{limits(item)}", found if fits else value, fits


def limits(item):
    return f" from {item.min} to {item.max}" if item.min is not None and item.max is not None else ""


def text(item, value, judged):
    return "a text", value, isinstance(value, str)


def choice(item, value, judged):
    fits = isinstance(value, str) and (judged or value in item.options)
    return "the name of a file or a kernel" if judged else f"one of {', '.join(map(str, item.options))}", value, fits


CONSTANTS = {"INT": whole_number, "FLOAT": number, "STRING": text, "COMBO": choice}
CONSTANTS["COMFY_MULTITYPED_V3"] = text  # a name that is chosen from a list or comes as a text: the file of prompts


# --- sockets ---------------------------------------------------------------------------------------------------------


def has(*names):
    """A test for an object whose type has these methods; asking the type reads no file of a lazy text encoder."""
    return lambda value: all(callable(getattr(type(value), name, None)) for name in names)


def dense(value):
    """Whether a value is a tensor of floating-point numbers that can be read: real, in memory, not sparse."""
    return torch.is_tensor(value) and value.is_floating_point() and value.layout is torch.strided and not value.is_meta


def numbers(value):
    return dense(value) and value.numel() > 0


def is_latent(value):
    if not isinstance(value, dict) or "samples" not in value:
        return False
    samples, mask, places = value["samples"], value.get("noise_mask"), value.get("batch_index")
    # ComfyUI makes the noise of every image up to the highest of these
    if places is not None and not (isinstance(places, list) and all(place in range(MOST_IMAGES) for place in places)):
        return False
    if getattr(samples, "is_nested", False):  # video with sound: core's own kind of tensor
        return True
    return numbers(samples) and samples.ndim >= 3 and (mask is None or numbers(mask))


def is_conditioning(value):
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in value)
        and all(context is None or (numbers(context) and context.ndim >= 2) for context, _ in value)
        and all(isinstance(options, dict) for _, options in value)
    )


def is_sigmas(value):
    return dense(value) and value.ndim == 1 and bool(value.isfinite().all())


def is_image(value):
    return numbers(value) and value.ndim == 4 and value.shape[-1] in (3, 4)


has_clip_methods = has("tokenize", "encode_from_tokens_scheduled", "clone")
SOCKETS = {
    "MODEL": ("a MODEL of a loader node", has("clone", "get_model_object")),
    # None passes: a checkpoint without a text encoder gives it, and the prompt nodes say so
    "CLIP": ("a CLIP of a loader node", lambda value: value is None or has_clip_methods(value)),
    "VAE": ("a VAE of a loader node", has("decode", "encode")),
    "GUIDER": ("a GUIDER", has("sample")),
    "SAMPLER": ("a SAMPLER", has("sample")),
    "SIGMAS": ("SIGMAS: one finite floating-point number for each step and one for the end", is_sigmas),
    "LATENT": ("a LATENT: 'samples' in floating point, (batch, channels, height, width), none of them 0", is_latent),
    "CONDITIONING": ("a CONDITIONING: at least one encoded prompt (batch, tokens, width)", is_conditioning),
    "IMAGE": ("an IMAGE: floating-point pixels (batch, height, width, 3 or 4), none of them 0", is_image),
}
