"""Drawing with the models while they train, and a rough judgement of the pictures with torch alone: is it learning?

The real judge (judge.py) needs scikit-image and looks at connected shapes; this one compares, for each object that was
asked for, the pixels of its colour with the six shapes by four numbers.
"""

import math
import struct
import zlib

import torch

from . import captions, scenes
from .train_flow import ROWS, text_states, velocity
from .transformer import picture

STEPS, GUIDANCE = 20, 4.0


def noise_schedule(steps, image_tokens):
    """(steps + 1,) noise levels from 1 to 0, as ComfyUI's Flux2Scheduler has them (comfy_extras/nodes_flux.py, below
    4300 tokens).
    """
    at_200, at_10 = 0.00016927 * image_tokens + 0.45666666, 8.73809524e-05 * image_tokens + 1.89833333
    mu = at_200 + (at_200 - at_10) / 190 * (steps - 200)
    time = torch.linspace(1, 0, steps + 1)
    return math.exp(mu) / (math.exp(mu) + 1 / time - 1)


@torch.no_grad()
def draw(models, prompt, reference, noise, rows=ROWS, guidance=GUIDANCE, steps=STEPS):
    """Euler's method from `noise` (B, N, 128) to pictures (B, 3, H, W) in -1..1. `prompt` is (ids, lengths)."""
    levels, x, text = (
        noise_schedule(steps, noise.shape[1]).tolist(),
        noise,
        text_states(models["text_encoder"], prompt, rows),
    )
    strength = torch.full((len(noise),), guidance, device=noise.device)
    for now, after in zip(levels, levels[1:]):
        x = x + (after - now) * velocity(
            models["transformer"], x, reference, text, torch.full_like(strength, now), strength
        )
    latent = picture(x, int(noise.shape[1] ** 0.5))
    return torch.cat([models["autoencoder"].decode(part) for part in latent.split(16)]).float().clamp(-1, 1)


class Examination:
    """Held-out scenes and edits, and a rough judgement of what models draw of them. The captions are those that
    judge_small.py uses.
    """

    def __init__(self, count, device, seed=7):
        generator = torch.Generator(device).manual_seed(seed)
        self.ids, self.noise = captions.Ids(device), torch.randn(count, 256, 128, generator=generator, device=device)
        self.table = scenes.joined(
            [
                scenes.sample(rows, generator, [float(number == n) for n in range(3)], cats=False, held_out=True)
                for number, rows in enumerate((count // 4, count // 4, count - 2 * (count // 4)))
            ]
        )
        self.phrases, self.relation = captions.describe(self.table, generator, full=True)
        self.before = scenes.sample(count, generator, cats=False, held_out=True, for_edits=True)
        self.after, *how = scenes.edit(self.before, generator)
        self.task, self.orders = how[0], captions.instruct(self.before, *how, generator, full=True)

    def sit(self, models, autocast, rows=ROWS, guidance=GUIDANCE, steps=STEPS):
        """(lines, pictures (2 * count, 3, 256, 256)): texts, then edits."""
        with autocast():
            drawn = draw(models, self.ids(self.phrases), None, self.noise, rows, guidance, steps)
            latent = torch.cat([models["autoencoder"].encode(part) for part in scenes.draw(self.before).split(16)])
            reference = latent.flatten(2).transpose(1, 2).float()
            edited = draw(models, self.ids(self.orders), reference, self.noise, rows, guidance, steps)
        return f"{self.of_texts(drawn)}; {self.of_edits(edited)}", torch.cat([drawn, edited])

    def of_texts(self, drawn):
        right, shown = objects_right(drawn, self.table), self.table.shown
        whole = (right | ~shown).all(1) & ~strangers(drawn, self.table)
        related = relations_right(drawn, self.table, self.relation)[self.relation >= 0]
        counts = " ".join(
            f"{number} shapes {_share(right[self.table.count == number][shown[self.table.count == number]])} "
            f"whole {_share(whole[self.table.count == number])},"
            for number in (1, 2, 3)
        )
        return f"right of {counts} relations {_share(related)}"

    def of_edits(self, edited):
        wanted, unchanged = scenes.draw(self.after), scenes.draw(self.before)
        whole = (objects_right(edited, self.after) | ~self.after.shown | (self.after.hat >= 0)[:, None]).all(
            1
        ) & covered(edited, wanted)
        tasks = ", ".join(
            f"{name} {_share(whole[self.task == number])}" for number, name in enumerate(("recolour", "remove", "hat"))
        )
        return f"edits: {tasks}, error {_error(edited, wanted):.1f}/255 (unedited {_error(unchanged, wanted):.1f})"


def _share(right):
    return f"{float(right.float().mean()):.2f}" if len(right) else "-"


def _error(found, wanted):
    return float((found - wanted).abs().mean() * 127.5)


# --- the rough judge
# -----------------------------------------------------------------------------------------------------


def masks(pixels):
    """(B, 8, H, W) bool: which pixels have which colour, by the nearest of all colours and grounds."""
    every = torch.cat([scenes.palette(table, pixels.device) for table in (scenes.COLOURS, scenes.GROUNDS)])
    values = (pixels + 1) / 2
    distance = torch.stack([(values - colour[:, None, None]).square().sum(1) for colour in every], dim=1)
    nearest, which = distance.min(1)
    return torch.stack([(which == number) & (nearest < 0.08) for number in range(len(scenes.COLOURS))], dim=1)


def features(mask):
    """(..., 4) of masks (..., H, W): how much of its bounding box a mask fills, its centre in the box (2), and whether
    the box's middle is filled.
    """
    height, width = mask.shape[-2:]
    mask = mask.float()
    area = mask.sum((-2, -1)).clamp_min(1)
    y, x = torch.arange(height, device=mask.device) + 0.5, torch.arange(width, device=mask.device) + 0.5
    top, bottom = _extent(mask.sum(-1), area)
    left, right = _extent(mask.sum(-2), area)
    cy, cx = (mask.sum(-1) * y).sum(-1) / area, (mask.sum(-2) * x).sum(-1) / area
    box = (bottom - top).clamp_min(1), (right - left).clamp_min(1)
    middle = ((y - ((top + bottom) / 2)[..., None]).abs() < 0.08 * box[0][..., None])[..., :, None] & (
        (x - ((left + right) / 2)[..., None]).abs() < 0.08 * box[1][..., None]
    )[..., None, :]
    filled = (mask * middle).sum((-2, -1)) / middle.sum((-2, -1)).clamp_min(1)
    return (
        torch.stack([area / (box[0] * box[1]), (cy - top) / box[0], (cx - left) / box[1], filled * 0.5], dim=-1),
        area,
        cy,
        cx,
    )


def _extent(profile, area):
    """First and last place of the middle 99 percent of a mask."""
    part = profile.cumsum(-1) / area[..., None]
    return (part < 0.005).sum(-1).float(), (part < 0.995).sum(-1).float() + 1


def objects_right(pixels, table):
    """(B, N) bool: is there about the right amount of the object's colour, in the shape of its kind?"""
    found = masks(pixels).gather(1, table.colour[:, :, None, None].expand(-1, -1, *pixels.shape[-2:]))
    shape, area, _, _ = features(found)
    y, x = torch.meshgrid(*(torch.arange(128, device=pixels.device) - 63.5,) * 2, indexing="ij")
    plain = torch.stack(
        [scenes.outline(torch.tensor(kind, device=pixels.device), x, y, 50.0) < 0 for kind in range(scenes.SHAPES)]
    )
    distance = (shape[:, :, None] - features(plain)[0]).norm(dim=-1)  # (B, N, 6)
    return (distance.argmin(-1) == table.kind) & (area > 200) & (area < 8000) & table.shown


def relations_right(pixels, table, relation):
    """(B,) bool: do the first two objects stand as `relation` says?"""
    found = masks(pixels).gather(1, table.colour[:, :2, None, None].expand(-1, -1, *pixels.shape[-2:]))
    _, area, y, x = features(found)
    down, right = y[:, 1] - y[:, 0], x[:, 1] - x[:, 0]
    holds = torch.stack([down, -down, right, -right], dim=1).gather(1, relation.clamp_min(0)[:, None])[:, 0] > 16
    return holds & (area > 200).all(1) & (relation >= 0)


def strangers(pixels, table):
    """(B,) bool: is there much of a colour that no shown object has?"""
    area, wanted = (
        masks(pixels).sum((-2, -1)),
        torch.zeros(len(table), len(scenes.COLOURS), dtype=torch.bool, device=pixels.device),
    )
    for number in range(scenes.OBJECTS):
        wanted |= (
            torch.nn.functional.one_hot(table.colour[:, number], len(scenes.COLOURS)).bool()
            & table.shown[:, number, None]
        )
    return ((area > 200) & ~wanted).any(1)


def covered(found, expected, share=0.8):
    """(B,) bool: does every colour lie about where it should, `share` of it at least?"""
    found, expected = masks(found), masks(expected)
    both, larger = (found & expected).sum((-2, -1)), torch.maximum(found.sum((-2, -1)), expected.sum((-2, -1)))
    return ((both > share * larger) | (larger < 60)).all(1)


# --- pictures without a picture library
# ------------------------------------------------------------------------------------


def write_png(path, pixels, columns):
    """A contact sheet of pictures (B, 3, H, W) in -1..1."""
    count, _, height, width = pixels.shape
    sheet = (
        pixels[: count // columns * columns]
        .unflatten(0, (-1, columns))
        .permute(0, 3, 1, 4, 2)
        .reshape(-1, columns * width, 3)
    )
    data = ((sheet + 1) * 127.5).round().to("cpu", torch.uint8).numpy()
    lines = b"".join(b"\0" + line.tobytes() for line in data)
    header = struct.pack(">IIBBBBB", columns * width, len(data), 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(
                _chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
            )
        )


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
