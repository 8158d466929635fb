"""The published FLUX.2 diffusion models as rows, and the text encoders that feed them.

A row is what can be read from the shapes in a file. Adding a variant is adding a row.
"""

from dataclasses import dataclass

HEAD_CHANNELS = 128  # channels of one attention head, in every variant
LATENT_CHANNELS = 128  # channels of a FLUX.2 latent at 1/16 of the image's size
TEXT_TAPS = 3  # hidden states of the text encoder that are joined: the text width is three times the encoder's width


@dataclass(frozen=True)
class Variant:
    """One FLUX.2 diffusion model."""

    title: str
    hidden: int  # width of the transformer
    double_blocks: int
    single_blocks: int
    text_width: int  # width of the encoded prompt that it reads
    guidance: bool  # has an embedder for the guidance value (FLUX.2 dev); klein has none
    text_encoder: str  # what must encode the prompt

    @property
    def heads(self):
        return self.hidden // HEAD_CHANNELS


VARIANTS = (
    Variant("FLUX.2 dev", 6144, 8, 48, 15360, True, "Mistral 3 (24B)"),
    Variant("FLUX.2 klein 4B", 3072, 5, 20, 7680, False, "Qwen3 4B"),
    Variant("FLUX.2 klein 9B", 4096, 8, 24, 12288, False, "Qwen3 8B"),
)


def find(hidden, double_blocks, single_blocks, text_width, guidance):
    """The variant with these dimensions and the reason: (Variant, sentence). A model that is not in the table gets a
    row of its own.
    """
    for variant in VARIANTS:
        if (variant.hidden, variant.double_blocks, variant.single_blocks, variant.text_width) == (
            hidden,
            double_blocks,
            single_blocks,
            text_width,
        ):
            return (
                variant,
                f"its width {hidden}, its {double_blocks} + {single_blocks} blocks and its text width {text_width} "
                f"are those of {variant.title}",
            )
    encoder = encoder_for(text_width)
    custom = Variant("FLUX.2 (custom size)", hidden, double_blocks, single_blocks, text_width, guidance, encoder)
    return (
        custom,
        f"no published FLUX.2 is {hidden} wide with {double_blocks} + {single_blocks} blocks and text width "
        f"{text_width}",
    )


def encoder_for(text_width):
    """The text encoder whose output is `text_width` wide, in words."""
    named = [variant.text_encoder for variant in VARIANTS if variant.text_width == text_width]
    return named[0] if named else f"an encoder {text_width // TEXT_TAPS} wide"


def describe(variant):
    """One line: name, width, blocks, text width, guidance."""
    guidance = "with guidance embedding" if variant.guidance else "without guidance embedding"
    return (
        f"{variant.title}: width {variant.hidden} ({variant.heads} heads of {HEAD_CHANNELS}), {variant.double_blocks} "
        f"double + {variant.single_blocks} single blocks, reads prompts {variant.text_width} wide from "
        f"{variant.text_encoder}, {guidance}"
    )
