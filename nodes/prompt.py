"""Prompts: encode them once and keep the result, encode many, and let Mistral 3 write a better one."""

import hashlib
import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..attention.errors import UserError
from ..flux2.prompts import text as prompt_text, tokens
from ..flux2 import page_words
from ..flux2.upsampling import upsample
from ..flux2.checkpoints.folders import locate
from ..flux2.prompts.cache import PromptCache
from ..flux2.prompts.encode import encode, encode_all
from .attention import CATEGORY
from .status import running_server

GIB = 2**30
LONG = {"cut at 512 tokens": tokens.LIMIT, "keep all": None}
SPLITS = ["each line", "blank lines"]
NO_FILE = ""
CLEAR_ROUTE = "/flux2_attention/prompt_cache/clear"
IMAGES = [f"image_{number}" for number in range(1, upsample.MOST_IMAGES + 1)]

CLIP_TOOLTIP = (
    "The text encoder of Load FLUX.2 Text Encoder. With its input load on 'when needed' nothing of it is read while "
    "prompts come from disk. CLIPs of other loaders work too, without keeping anything."
)
REPORT_TOOLTIP = (
    "From cache or encoded, how long it took, and everything in the prompt that FLUX.2 does not read as written."
)


def cache_inputs():
    """The two inputs that decide about the folder of encoded prompts."""
    return [
        io.Combo.Input(
            "long_prompts",
            display_name="long prompts",
            options=list(LONG),
            default="cut at 512 tokens",
            optional=True,
            advanced=True,
            tooltip="What happens to a prompt of more than 512 tokens, system message included. 'cut at 512 tokens': "
            "as the official code does; the report says what was lost. 'keep all': as CLIP Text Encode does. For a "
            "long prompt the two give different images.",
        ),
        io.Float.Input(
            "cache_gib",
            display_name="disk cache (GiB, 0 = off)",
            default=2.0,
            min=0.0,
            max=1024.0,
            step=0.25,
            optional=True,
            advanced=True,
            tooltip="How much disk all encoded prompts together may take, in GiB, in ComfyUI's user folder. Above it "
            "the least recently used go. A prompt takes 4 to 30 MiB. 0 keeps nothing and reads nothing.",
        ),
    ]


def store(gib=2.0):
    """The folder of encoded prompts in ComfyUI's user folder, or None when nothing may be kept."""
    folder = os.path.join(folder_paths.get_user_directory(), "flux2_attention", "prompts")
    return PromptCache(folder, int(gib * GIB)) if gib > 0 else None


class Flux2EncodePrompt(io.ComfyNode):
    """A prompt to CONDITIONING, from disk when it was encoded before."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2EncodePrompt",
            display_name="Encode Prompt (FLUX.2)",
            category=f"{CATEGORY}/prompt",
            description="Encodes a prompt as CLIP Text Encode does and keeps the result on disk: a prompt that was "
            "encoded before, with the same encoder, comes back without loading the encoder. Says what in a prompt "
            "FLUX.2 does not support.",
            search_aliases=["clip text encode", "cached prompt", "prompt cache", "conditioning", "positive prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip=CLIP_TOOLTIP),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. Plain sentences; FLUX.2 has no weights and no embeddings.",
                ),
                *cache_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="The encoded prompt, what CLIP Text Encode gives."),
                io.String.Output(display_name="report", tooltip=REPORT_TOOLTIP),
            ],
        )

    @classmethod
    def execute(cls, clip, text, long_prompts="cut at 512 tokens", cache_gib=2.0) -> io.NodeOutput:
        done = encode(clip, text, store(cache_gib), LONG[long_prompts])
        return io.NodeOutput(done.conditioning, done.report, ui=ui.PreviewText(done.report))


class Flux2EncodePrompts(io.ComfyNode):
    """Many prompts to a list of CONDITIONING."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2EncodePrompts",
            display_name="Encode Prompt List (FLUX.2)",
            category=f"{CATEGORY}/prompt",
            description="Encodes many prompts, from a text or a file, several in one pass through the encoder, and "
            "gives them out as a list: what follows runs once for each. Prompts that were encoded before come from "
            "disk.",
            search_aliases=["prompt list", "prompts from file", "batch prompts", "wildcards", "multiple prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip=CLIP_TOOLTIP),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="The prompts. They come before those of the file; empty lines are left out.",
                ),
                # also a STRING, which saved graphs may have connected here; that type makes ComfyUI take names of files
                # that are not there either, and execute says so
                io.MultiType.Input(
                    io.Combo.Input(
                        "file",
                        options=[NO_FILE, *text_files()],
                        default=NO_FILE,
                        optional=True,
                        tooltip="A text file (UTF-8) with prompts in ComfyUI's input folder, or nothing.",
                    ),
                    [io.String],
                ),
                io.Combo.Input(
                    "split",
                    options=SPLITS,
                    default=SPLITS[0],
                    optional=True,
                    tooltip="Where one prompt ends. 'each line': every line is a prompt. 'blank lines': a prompt may "
                    "have several lines.",
                ),
                *cache_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(is_output_list=True, tooltip="The encoded prompts, one for each image."),
                io.String.Output(
                    display_name="texts", is_output_list=True, tooltip="The prompts as text, in the same order."
                ),
                io.String.Output(display_name="report", tooltip=REPORT_TOOLTIP),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file=NO_FILE, **others):
        return content_of(file or NO_FILE)  # None where another node gives the name

    @classmethod
    def execute(
        cls, clip, prompts, file=NO_FILE, split=SPLITS[0], long_prompts="cut at 512 tokens", cache_gib=2.0
    ) -> io.NodeOutput:
        texts = gather(prompts, file, split)
        done = encode_all(clip, texts, store(cache_gib), LONG[long_prompts])
        report = list_report(texts, done)
        return io.NodeOutput([one.conditioning for one in done], texts, report, ui=ui.PreviewText(report))


def gather(text, file, split):
    """The prompts of a text and of a file in the input folder. ValueError when there are none, or the file cannot be
    read.
    """
    found = prompt_text.split(text, split)
    if file.strip():
        found += prompt_text.split(text_of(file), split)
    if not found:
        raise UserError(
            "There is no prompt to encode: the text and the file are empty. Write a prompt on each line, or name a "
            "text file of ComfyUI's input folder.",
            "prompts",
        )
    return found


def text_files():
    """Names of the text files in ComfyUI's input folder."""
    return sorted(path.name for path in Path(folder_paths.get_input_directory()).glob("*.txt"))


def text_of(file):
    """The text of a file in the input folder. ValueError when it cannot be read."""
    return prompt_text.read_file(locate(file.strip(), text_files(), [folder_paths.get_input_directory()], "input"))


def content_of(file):
    """A digest of a file in the input folder, so that ComfyUI runs the node again after an edit; the same for all that
    cannot be read.
    """
    try:
        return hashlib.sha256(text_of(file).encode()).hexdigest() if file.strip() else ""
    except ValueError:  # execute says what is wrong
        return ""


def list_report(texts, done):
    """How many hits, then each prompt with its report."""
    hits = sum(one.hit for one in done)
    parts = [
        f"{number}. {text[:60]}{'...' if len(text) > 60 else ''}\n{one.report}"
        for number, (text, one) in enumerate(zip(texts, done), 1)
    ]
    return "\n\n".join(
        [f"{prompt_text.count(len(done), 'prompt')}: {hits} from disk, {len(done) - hits} encoded.", *parts]
    )


class Flux2UpsamplePrompt(io.ComfyNode):
    """A better prompt, written by the text encoder's own language model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2UpsamplePrompt",
            display_name="Improve Prompt with Mistral (FLUX.2)",
            category=f"{CATEGORY}/prompt",
            description=(
                "Lets Mistral 3, the language model that reads prompts for FLUX.2 dev, write a more detailed prompt, "
                "or with reference images a precise editing instruction. Uses the weights of the loaded text encoder "
                "and adds what writing needs from its file. The text encoder file that ComfyUI's templates download "
                "cannot write: this needs the Hugging Face folder or a complete file."
            ),
            search_aliases=["prompt upsampling", "enhance prompt", "prompt rewrite", "llm", "caption"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="Mistral 3 from Load FLUX.2 Text Encoder: a Hugging Face folder, or a file with all "
                    "layers and lm_head. The small file made for ComfyUI has no lm_head and cannot write.",
                ),
                io.String.Input(
                    "text", multiline=True, tooltip="The prompt to improve, or what to change in the reference images."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The same seed writes the same text on the same device. Without effect at temperature 0.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.15,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How freely words are chosen. 0.15 is the official value; 0 always takes the likeliest "
                    "word.",
                ),
                io.Int.Input(
                    "max_tokens",
                    display_name="longest answer (tokens)",
                    default=512,
                    min=1,
                    max=4096,
                    tooltip="The longest text to write, in tokens. FLUX.2 reads 512, system message included.",
                ),
                *(
                    io.Image.Input(
                        name,
                        optional=True,
                        tooltip="A reference image to look at. With any, the text is an editing instruction about "
                        "them.",
                    )
                    for name in IMAGES
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="prompt", tooltip="The improved prompt, for Encode Prompt or CLIP Text Encode."
                ),
                io.String.Output(
                    display_name="report", tooltip="Tokens, seconds, and what was noticed about the request."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, text, seed, temperature, max_tokens, **images) -> io.NodeOutput:
        settings = upsample.WritingSettings(seed, temperature, max_tokens)
        written, report = upsample.upsample(
            clip,
            text,
            [images[name] for name in IMAGES if images.get(name) is not None],
            settings,
            show=page_words.tell,
        )
        return io.NodeOutput(written, report, ui=ui.PreviewText(f"{written}\n\n{report}"))


def add_routes():
    """The address behind the button that clears the folder of encoded prompts."""
    server = running_server()
    if server is None:
        return
    from aiohttp import web

    @server.routes.post(CLEAR_ROUTE)
    async def clear(request):
        entries, size = store().clear()
        return web.json_response({"entries": entries, "bytes": size})


NODES = [Flux2EncodePrompt, Flux2EncodePrompts, Flux2UpsamplePrompt]
