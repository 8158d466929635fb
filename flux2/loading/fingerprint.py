"""A name for a text encoder made from what is in its files: the same weights have the same name wherever and whenever
they were saved.

What goes in: the family, its dimensions, quantisation marks and tokenizer; and of every weight that FLUX.2 reads, under
ComfyUI's key, its shape, number format and bytes - all of them up to SMALL, four samples spread over it above. So a
single file, a pruned file and a Hugging Face folder of the same weights agree, a LoRA merged into any layer shows, and
48 GB cost 35 MB of reading. Not seen: an edit confined to bytes between the samples, such as one row of the embedding;
no training or merging tool makes such edits.
"""

import hashlib
import json
import struct

from ..checkpoints import keys

FORMAT = 1
SMALL = 65536  # bytes; a tensor up to this size is read whole
SAMPLE, SAMPLES = 16384, 4


def fingerprint(checkpoint, found, family, sizes, tokenizer):
    """Hexadecimal digest of an encoder. `tokenizer`: the bytes of the tokenizer file beside the weights, or empty when
    it is inside or known.
    """
    digest = hashlib.sha256()
    about = [
        FORMAT,
        found.kind,
        sizes,
        checkpoint.metadata.get("_quantization_metadata", ""),
        hashlib.sha256(tokenizer).hexdigest(),
    ]
    digest.update(json.dumps(about, sort_keys=True).encode())
    files = {file: open(file, "rb") for file in checkpoint.files}
    try:
        for name, tensor in sorted(_read_by_flux2(checkpoint, found.prefix, family.last_tap).items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            for part in _samples(files[tensor.file], tensor, whole=name in TOKENIZERS):
                digest.update(part)
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


TOKENIZERS = ("tekken_model", "tokenizer_json")


def _read_by_flux2(checkpoint, prefix, layers):
    """The weights that FLUX.2 reads under ComfyUI's keys, and a tokenizer kept among them."""
    named = (
        (name if name in TOKENIZERS else keys.encoder_name(name, prefix, layers), tensor)
        for name, tensor in checkpoint.tensors.items()
    )
    return {name: tensor for name, tensor in named if name}


def _samples(file, tensor, whole):
    """Bytes of a tensor: all, or a few pieces from its beginning to its end."""
    file.seek(0)
    data = 8 + struct.unpack("<Q", file.read(8))[0] + tensor.start
    if whole or tensor.bytes <= SMALL:
        file.seek(data)
        yield file.read(tensor.bytes)
        return
    for number in range(SAMPLES):
        file.seek(data + number * (tensor.bytes - SAMPLE) // (SAMPLES - 1))
        yield file.read(SAMPLE)
