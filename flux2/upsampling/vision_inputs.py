"""Reference images for the language model: ComfyUI images -> what Mistral 3's vision tower takes, and the tokens that
stand for them.

An image is scaled down to the reference's area and the tower's longest side, then to whole groups of patches; a group
is one token.
"""

import math

import torch

from ...attention.errors import UserError

MOST_PIXELS = 768**2  # the reference shows images to the language model no larger than this
# of the images the tower was trained on
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def frames(images, most):
    """The single images of ComfyUI images (N, H, W, C), each as (3, H, W) in float32. ValueError for what is not a
    readable image.
    """
    found = [one for number, image in enumerate(images, 1) for one in _frames(image, number)]
    if len(found) > most:
        raise UserError(
            (
                f"There are {len(found)} reference images and at most {most} can be shown. A batch counts as many "
                "images; pick from it."
            ),
            "reference-images",
        )
    return found


def _frames(image, number):
    if not torch.is_tensor(image) or image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        shape = list(image.shape) if torch.is_tensor(image) else type(image).__name__
        raise UserError(
            (
                f"Reference image {number} cannot be read: it is {shape}, where an IMAGE has the shape [images, "
                "height, width, 3]."
            ),
            "reference-images",
        )
    image = image[..., :3].float().cpu()
    if not image.isfinite().all():
        raise UserError(
            (
                f"Reference image {number} cannot be read: it contains values that are not numbers, as a failed VAE "
                "decode leaves them."
            ),
            "reference-images",
        )
    return list(image.expand(*image.shape[:3], 3).clamp(0, 1).movedim(-1, 1))


def target_size(height, width, unit, longest):
    """(height, width) in whole units: within MOST_PIXELS and `longest`, never enlarged beyond the next unit."""
    shrink = max(1.0, math.sqrt(height * width / MOST_PIXELS), max(height, width) / longest)
    return tuple(max(1, math.ceil(math.floor(side / shrink) / unit)) * unit for side in (height, width))


def prepared(found, unit, longest):
    """(pixel values (N, 3, H, W) in one frame, sizes (N, 2)) of images."""
    sizes = [target_size(*image.shape[1:], unit, longest) for image in found]
    values = torch.zeros(len(found), 3, max(size[0] for size in sizes), max(size[1] for size in sizes))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for value, image, (height, width) in zip(values, found, sizes):
        scaled = torch.nn.functional.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(
            0, 1
        )
        value[:, :height, :width] = (scaled - mean) / std
    return values, torch.tensor(sizes)


def image_tokens(sizes, unit, token, line_end, end):
    """The ids that stand for images of these sizes, one image after another: a row of `token` per row of units, closed
    by `line_end` or `end`.
    """
    ids = []
    for height, width in sizes.tolist():
        rows = [[token] * (width // unit) + [line_end] for _ in range(height // unit)]
        rows[-1][-1] = end
        ids += [one for row in rows for one in row]
    return ids
