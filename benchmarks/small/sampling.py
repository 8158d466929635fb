"""Drawing with the models while they train, and a rough judgement of the pictures with torch alone: is it learning?

The real judge (judge.py) needs scikit-image and looks at connected shapes; this one compares, for each object that was asked for, the pixels of
its colour with the six shapes by four numbers.
"""
import math
import struct
import zlib

import torch

from . import captions, scenes
from .train_flow import ROWS, velocity
from .transformer import picture

STEPS, GUIDANCE = 20, 4.0


def noise_schedule(steps, image_tokens):
    """(steps + 1,) noise levels from 1 to 0, as ComfyUI's Flux2Scheduler has them (comfy_extras/nodes_flux.py, below 4300 tokens)."""
    at_200, at_10 = 0.00016927 * image_tokens + 0.45666666, 8.73809524e-05 * image_tokens + 1.89833333
    mu = at_200 + (at_200 - at_10) / 190 * (steps - 200)
    time = torch.linspace(1, 0, steps + 1)
    return math.exp(mu) / (math.exp(mu) + 1 / time - 1)


@torch.no_grad()
def draw(models, prompt, reference, noise, rows=ROWS, guidance=GUIDANCE, steps=STEPS):
    """Euler's method from `noise` (B, N, 128) to pictures (B, 3, H, W) in -1..1. `prompt` is (ids, lengths)."""
    levels, x = noise_schedule(steps, noise.shape[1]).tolist(), noise
    strength = torch.full((len(noise),), guidance, device=noise.device)
    for now, after in zip(levels, levels[1:]):
        x = x + (after - now) * velocity(models, x, reference, prompt, torch.full_like(strength, now), strength, rows)
    latent = picture(x, int(noise.shape[1] ** 0.5))
    return torch.cat([models["autoencoder"].decode(part) for part in latent.split(16)]).float().clamp(-1, 1)


@torch.no_grad()
def check(models, autocast, rows, guidance, device, count=64, steps=STEPS, seed=7):
    """(one line, pictures (2 * count, 3, 256, 256)): held-out scenes, and edits of held-out scenes, drawn and roughly judged."""
    generator = torch.Generator(device).manual_seed(seed)
    ids, noise = captions.Ids(device), torch.randn(count, 256, 128, generator=generator, device=device)
    table = scenes.sample(count, generator, cats=False, held_out=True)
    phrases, relation = captions.describe(table, generator, full=True)
    before = scenes.sample(count, generator, cats=False, held_out=True, for_edits=True)
    after, *how = scenes.edit(before, generator)
    instructions = captions.instruct(before, *how, generator, full=True)
    with autocast():
        drawn = draw(models, ids(phrases), None, noise, rows, guidance, steps)
        reference = models["autoencoder"].encode(scenes.draw(before)).flatten(2).transpose(1, 2).float()
        edited = draw(models, ids(instructions), reference, noise, rows, guidance, steps)
    wanted, unchanged = scenes.draw(after), scenes.draw(before)
    right = objects_right(drawn, table)
    whole, related = (right | ~table.shown).all(1), relations_right(drawn, table, relation)
    line = (f"objects {_share(right[table.shown])}, whole pictures {_share(whole)}, relations {_share(related[relation >= 0])}; edits: error "
            f"{_error(edited, wanted):.1f}/255, unedited {_error(unchanged, wanted):.1f}, objects {_share(objects_right(edited, after)[after.shown])}")
    return line, torch.cat([drawn, edited])


def _share(right):
    return f"{float(right.float().mean()):.2f}"


def _error(found, wanted):
    return float((found - wanted).abs().mean() * 127.5)


# --- the rough judge -----------------------------------------------------------------------------------------------------

def masks(pixels):
    """(B, 8, H, W) bool: which pixels have which colour, by the nearest of all colours and grounds."""
    every = torch.cat([scenes.palette(table, pixels.device) for table in (scenes.COLOURS, scenes.GROUNDS)])
    values = (pixels + 1) / 2
    distance = torch.stack([(values - colour[:, None, None]).square().sum(1) for colour in every], dim=1)
    nearest, which = distance.min(1)
    return torch.stack([(which == number) & (nearest < 0.08) for number in range(len(scenes.COLOURS))], dim=1)


def features(mask):
    """(..., 4) of masks (..., H, W): how much of its bounding box a mask fills, its centre in the box (2), and whether the box's middle is filled."""
    height, width = mask.shape[-2:]
    mask = mask.float()
    area = mask.sum((-2, -1)).clamp_min(1)
    y, x = torch.arange(height, device=mask.device) + 0.5, torch.arange(width, device=mask.device) + 0.5
    top, bottom = _extent(mask.sum(-1), area)
    left, right = _extent(mask.sum(-2), area)
    cy, cx = (mask.sum(-1) * y).sum(-1) / area, (mask.sum(-2) * x).sum(-1) / area
    box = (bottom - top).clamp_min(1), (right - left).clamp_min(1)
    middle = ((y - ((top + bottom) / 2)[..., None]).abs() < 0.08 * box[0][..., None])[..., :, None] & \
             ((x - ((left + right) / 2)[..., None]).abs() < 0.08 * box[1][..., None])[..., None, :]
    filled = (mask * middle).sum((-2, -1)) / middle.sum((-2, -1)).clamp_min(1)
    return torch.stack([area / (box[0] * box[1]), (cy - top) / box[0], (cx - left) / box[1], filled * 0.5], dim=-1), area, cy, cx


def _extent(profile, area):
    """First and last place of the middle 99 percent of a mask."""
    part = profile.cumsum(-1) / area[..., None]
    return (part < 0.005).sum(-1).float(), (part < 0.995).sum(-1).float() + 1


def objects_right(pixels, table):
    """(B, N) bool: is there about the right amount of the object's colour, in the shape of its kind?"""
    found = masks(pixels).gather(1, table.colour[:, :, None, None].expand(-1, -1, *pixels.shape[-2:]))
    shape, area, _, _ = features(found)
    y, x = torch.meshgrid(*(torch.arange(128, device=pixels.device) - 63.5,) * 2, indexing="ij")
    plain = torch.stack([scenes.outline(torch.tensor(kind, device=pixels.device), x, y, 50.0) < 0 for kind in range(scenes.SHAPES)])
    distance = (shape[:, :, None] - features(plain)[0]).norm(dim=-1)  # (B, N, 6)
    return (distance.argmin(-1) == table.kind) & (area > 200) & (area < 8000) & table.shown


def relations_right(pixels, table, relation):
    """(B,) bool: do the first two objects stand as `relation` says?"""
    found = masks(pixels).gather(1, table.colour[:, :2, None, None].expand(-1, -1, *pixels.shape[-2:]))
    _, area, y, x = features(found)
    down, right = y[:, 1] - y[:, 0], x[:, 1] - x[:, 0]
    holds = torch.stack([down, -down, right, -right], dim=1).gather(1, relation.clamp_min(0)[:, None])[:, 0] > 16
    return holds & (area > 200).all(1) & (relation >= 0)


# --- pictures without a picture library ------------------------------------------------------------------------------------

def write_png(path, pixels, columns):
    """A contact sheet of pictures (B, 3, H, W) in -1..1."""
    count, _, height, width = pixels.shape
    sheet = pixels[:count // columns * columns].unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).reshape(-1, columns * width, 3)
    data = ((sheet + 1) * 127.5).round().to("cpu", torch.uint8).numpy()
    lines = b"".join(b"\0" + line.tobytes() for line in data)
    header = struct.pack(">IIBBBBB", columns * width, len(data), 8, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))))


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
