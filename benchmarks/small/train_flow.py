"""Training of the transformer: flow matching on scenes and edits, with the autoencoder and the text encoder as they
are.

  x = (1 - s) * latent + s * noise, target velocity noise - latent; s from a shifted logit-normal distribution (Esser et
  al. 2024).

Latents and text states are made ahead, into pools, and used several times each with other noise: a step is the
transformer alone. Every LONG-th step feeds the 512 text rows of inference, the others LONGEST rows at the same
positions, which costs less than half. From GUIDED on, half of each batch of scenes gets the target moved by what the
prompt does to the prediction of the running average (model guidance, Tang et al. 2025): so the guidance input has an
effect, and the pictures are learnt from all the same.
"""

import time as clocks
import traceback

import torch
from torch.nn import functional as F

from . import captions, scenes, train_text
from .encoder import left_padded
from .optimiser import Optimiser, halves
from .progress import Average, Clock, Every, Mean, log
from .transformer import positions, tokens

ROWS = 512  # text rows that ComfyUI feeds the transformer (model_base.Flux2.extra_conds)
# share of a run from which: guidance has an effect, the learning rate falls, all steps have 512 rows
GUIDED, DECAY, FULL_ROWS = 0.55, 0.6, 0.88
RATES, WARM = (3e-3, 1.5e-3), 100  # learning rates of Muon and Adam; steps of warming up
DROPPED = 0.1  # share of empty prompts
SHIFT, UNIFORM = 3.0, 0.1  # shift of the noise levels towards more noise; share of them that is uniform
# range of the guidance input; classifier-free scale is 1 + (guidance - 1) * STRENGTH
GUIDANCE, STRENGTH = (1.0, 6.0), 0.25
REUSED, TOGETHER = 12, 8  # how often a drawn picture is used; of how many steps the new ones are made at once
EDITS, LONG = 1 / 3, 8  # share of steps that train edits; every eighth of either kind has all text rows
# additional weight of the loss in cells with a shape, and in those that an edit could change
SHAPES, TOUCHABLE = 3.0, 6.0
UNSEEN = 0.1  # weight of the error in those dimensions of the latent that the decoder does not read


def velocity(transformer, noisy, reference, text, time, guidance):
    """(B, N, 128) velocity. `noisy` and `reference` (or None) are image tokens of square pictures, `text` (B, rows, C)
    the last of ROWS rows.
    """
    side = int(noisy.shape[1] ** 0.5)
    rotation = _rotation(text.shape[1], side, reference is not None, noisy.device)
    image = noisy if reference is None else torch.cat([noisy, reference], dim=1)
    return transformer(image, text, time, guidance, rotation)[:, : noisy.shape[1]].float()


def text_states(encoder, prompt, rows=captions.LONGEST):
    """(B, rows, C) states of `prompt`, (ids, lengths), behind zeros."""
    ids, lengths = prompt
    return left_padded(encoder(ids), lengths, rows)


def with_rows(text, rows):
    """Zeros before text states, up to `rows` rows."""
    return F.pad(text, (0, 0, rows - text.shape[1], 0))


_rotations = {}


def _rotation(rows, side, references, device):
    key = (rows, side, references, device)
    if key not in _rotations:
        _rotations[key] = positions(rows, side, side, int(references), device, first_row=ROWS - rows)
    return _rotations[key]


def noise_levels(rows, generator):
    """(B,) in 0..1."""
    normal = torch.randn(rows, generator=generator, device=generator.device).sigmoid()
    shifted = SHIFT * normal / (1 + (SHIFT - 1) * normal)
    uniform = torch.rand(rows, generator=generator, device=generator.device)
    return torch.where(torch.rand(rows, generator=generator, device=generator.device) < UNIFORM, uniform, shifted)


# --- what is trained on
# --------------------------------------------------------------------------------------------------


class Maker:
    """Entries of the pools: latents, text states and weights, bf16 on the device. `edits`: how often which, as
    edit_captions takes it.
    """

    def __init__(self, autoencoder, encoder, painter, generator, autocast, chunk=128, edits=None):
        self.autoencoder, self.encoder, self.painter, self.autocast, self.chunk = (
            autoencoder,
            encoder,
            painter,
            autocast,
            chunk,
        )
        self.generator, self.ids, self.edited = generator, captions.Ids(generator.device), edits or {}

    def scenes(self, rows):
        table, phrases = train_text.scene_captions(rows, self.generator)
        return {
            "latent": self.latents(table),
            "text": self.states(phrases),
            "weight": 1 + SHAPES * inside(table.cell, table.shown),
        }

    def edits(self, rows):
        before, after, phrases, _ = train_text.edit_captions(rows, self.generator, **self.edited)
        return {
            "latent": self.latents(after),
            "reference": self.latents(before),
            "text": self.states(phrases),
            "weight": 1 + TOUCHABLE * touchable(before),
        }

    @torch.no_grad()
    def latents(self, table):
        """Tokens (B, 256, 128) of pictures."""
        parts = []
        for start in range(0, len(table), self.chunk):
            pixels = scenes.draw(table[start : start + self.chunk], painter=self.painter)
            with self.autocast():
                parts.append(tokens(self.autoencoder.encode(pixels)).bfloat16())
        return torch.cat(parts)

    @torch.no_grad()
    def states(self, phrases, dropped=None):
        """Text states (B, LONGEST, C)."""
        parts = []
        for start in range(0, len(phrases), self.chunk):
            part = phrases[start : start + self.chunk]
            with self.autocast():
                parts.append(text_states(self.encoder, self.ids(part, dropped)).bfloat16())
        return torch.cat(parts)

    def nothing(self):
        """(1, LONGEST, C): the states of the empty prompt."""
        return self.states(torch.full((1, 1), captions.NONE, device=self.generator.device))


def inside(cell, shown):
    """(B, 256) 1.0 for the image tokens in the shown ones of some cells (B, K)."""
    third = torch.arange(16, device=cell.device) * 3 // 16
    of_token = (3 * third[:, None] + third).flatten()
    return ((cell[:, :, None] == of_token) & shown[:, :, None]).any(1).float()


def touchable(before):
    """(B, 256) 1.0 for the image tokens that some edit of a scene could change: the cells of its shapes, and those
    above them, where hats go. The same for every edit of it: weight on the changed cells alone would reward a model
    that is unsure which shape is meant for changing all of them.
    """
    return inside(torch.cat([before.cell, before.cell - 3], dim=1), before.shown.repeat(1, 2))


class Pool:
    """A fixed number of entries {name: (rows, ...)}, of which some are made anew now and then."""

    def __init__(self, rows, make, generator):
        self.rows, self.make, self.generator, self.entries = rows, make, generator, make(rows)

    def _some(self, count):
        return torch.randint(self.rows, (count,), generator=self.generator, device=self.generator.device)

    def refresh(self, count):
        index = self._some(count)
        for name, value in self.make(count).items():
            self.entries[name][index] = value

    def draw(self, count):
        index = self._some(count)
        return {name: value[index].float() for name, value in self.entries.items()}


# --- training
# ------------------------------------------------------------------------------------------------------------


class Flow:
    """The state of the training: the transformer, its average, pools and the optimiser. `batch` counts pictures of
    steps with LONGEST text rows and no reference; others have as many tokens. `guided` is the share of the run from
    which guidance has an effect: on scenes alone. What an instruction does to a picture includes what it leaves
    unclear, which shape is meant say, and guidance would exaggerate that too.
    """

    def __init__(self, model, copy, maker, batch, pool, autocast, guided=GUIDED, edits=EDITS, rate=1.0):
        self.model, self.generator, self.autocast, self.batch, self.guided, self.edits = (
            model,
            maker.generator,
            autocast,
            batch,
            guided,
            edits,
        )
        self.average = Average({"transformer": model}, {"transformer": copy})
        self.pools = [
            Pool(max(rows, 2), make, maker.generator) for rows, make in ((pool, maker.scenes), (pool // 2, maker.edits))
        ]
        self.seen_matrix, self.nothing = seen(maker.autoencoder), maker.nothing()
        self.optimiser = Optimiser(*halves({"transformer": model}), tuple(rate * full for full in RATES))
        self.steps = self.pictures = 0
        self.kinds = [0, 0]  # steps of scenes, of edits
        self.failures = 0

    def plan(self, share):
        """(edits?, text rows, pictures) of the next step."""
        edits = int((self.steps + 1) * self.edits) > int(self.steps * self.edits)
        rows = ROWS if share >= FULL_ROWS or self.kinds[edits] % LONG == LONG - 1 else captions.LONGEST
        length = rows + (512 if edits else 256)
        return edits, rows, max(2, self.batch * (captions.LONGEST + 256) // length // 8 * 8)

    def step(self, share):
        """One step; returns the loss, not yet waited for."""
        edits, rows, batch = self.plan(share)
        if self.kinds[edits] % TOGETHER == 0:
            self.pools[edits].refresh(max(1, batch * TOGETHER // REUSED))
        loss = self.loss(self.pools[edits].draw(batch), rows, share >= self.guided and not edits)
        loss.backward()
        self.kinds[edits] += 1
        self.steps, self.pictures = self.steps + 1, self.pictures + batch
        self.optimiser.step(min(1.0, self.steps / WARM) * min(1.0, 0.02 + (1 - share) / (1 - DECAY)))
        self.average.update()
        return loss

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator, device=self.generator.device)

    def loss(self, entries, rows, guided):
        latent, reference, text = entries["latent"], entries.get("reference"), with_rows(entries["text"], rows)
        noise = torch.randn(latent.shape, generator=self.generator, device=latent.device)
        time, target = noise_levels(len(latent), self.generator), noise - latent
        noisy = latent + time[:, None, None] * target
        half = len(latent) // 2
        guidance = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * self.uniform(len(latent))
        guidance[half:] = 1.0
        dropped = (self.uniform(len(latent)) < 2 * DROPPED) & (guidance == 1.0)
        empty = with_rows(self.nothing.float(), rows)
        if guided:
            moved = self.effect(
                noisy[:half],
                reference if reference is None else reference[:half],
                text[:half],
                empty,
                time[:half],
                guidance[:half],
            )
            target = torch.cat([target[:half] + moved, target[half:]])
        with self.autocast():
            found = velocity(
                self.model, noisy, reference, torch.where(dropped[:, None, None], empty, text), time, guidance
            )
        return weighted(found - target, entries["weight"], self.seen_matrix)

    @torch.no_grad()
    def effect(self, noisy, reference, text, empty, time, guidance):
        """What guidance adds to the velocity: a multiple of what the prompt does to the average model's."""
        twice = lambda x: None if x is None else torch.cat([x, x])
        both = torch.cat([text, empty.expand_as(text)])
        with self.autocast():
            found = velocity(
                self.average.models["transformer"],
                twice(noisy),
                twice(reference),
                both,
                twice(time),
                torch.ones_like(twice(time)),
            )
        prompted, unprompted = found.chunk(2)
        return ((guidance - 1) * STRENGTH)[:, None, None] * (prompted - unprompted)

    def forget_step(self):
        """After a step that failed: no gradients."""
        self.model.zero_grad(set_to_none=True)
        if self.generator.device.type == "cuda":
            torch.cuda.empty_cache()


def weighted(error, weight, seen):
    """Mean square of velocity errors (B, N, 128): by token `weight` (B, N), and UNSEEN where projection `seen` leaves
    nothing.
    """
    visible = (error @ seen).square().mean(-1)
    square = UNSEEN * error.square().mean(-1) + (1 - UNSEEN) * visible
    return (square * weight).sum() / weight.sum()


@torch.no_grad()
def seen(autoencoder):
    """(128, 128) projection of latent tokens on what the decoder reads of them: its first convolution has a size of one
    pixel.
    """
    read = autoencoder.decoder.post_quant_conv.weight.flatten(1).float()  # (32, 32)
    deviation = (autoencoder.bn.running_var + 1e-4).sqrt()
    # channel c of fold f is token channel 4 c + f
    whole = torch.kron(read, torch.eye(4, device=read.device)) * deviation
    _, strength, directions = torch.linalg.svd(whole)
    kept = directions[strength > 1e-3 * strength[0]]
    return kept.T @ kept


@torch.no_grad()
def match_scale(model, entries):
    """Divide the first layer of the text by the size of its states, so that it gives what random states of size 1
    would.
    """
    text = entries["text"][:256].float()
    size = text[text.abs().sum(-1) > 0].square().mean().sqrt()
    model.txt_in.weight /= size
    log(f"text states have a root mean square of {float(size):.2f}")


class Diverged(RuntimeError):
    """The loss is no longer a number; the last checkpoint is still good."""


def attempt(flow, share, to_eager):
    """One step, or None if it failed: then compilation is undone, and the second time the batch halved, so that a run
    is not lost to a compiler.
    """
    try:
        return flow.step(share)
    except Exception:  # the compiler, its kernels and the allocator raise many kinds
        flow.failures += 1
        if flow.failures > 3:
            raise
        log(f"step {flow.steps} failed; going on without compilation\n{traceback.format_exc(limit=-4)}")
        to_eager()
        flow.forget_step()
        flow.batch = flow.batch if flow.failures == 1 else max(2, flow.batch // 2)
        return None


def train(flow, seconds, checkpoint, to_eager):
    """Train for `seconds`. `checkpoint(flow, share)` is called every 100 seconds and at the end."""
    clock, report, saving, mean, before = Clock(seconds), Every(10), Every(100), Mean(), (0, clocks.monotonic())
    while not clock.over:
        share = clock.share
        loss = attempt(flow, share, to_eager)
        if loss is not None:
            mean.add(loss)
        if flow.steps in (1, 2, 3, 48) and loss is not None:
            log(
                f"step {flow.steps} given out {clock.elapsed:.0f} s into the flow; compiled: "
                f"{dict(torch._dynamo.utils.counters['frames'])}"
            )
        if report():
            value, now = mean.read(), (flow.pictures, clocks.monotonic())
            speed, before = (now[0] - before[0]) / (now[1] - before[1]), now
            log(
                f"flow {clock.elapsed:5.0f} s  share {share:.3f}  step {flow.steps:6d}  {speed:6.0f} pictures/s  "
                f"loss {value:.4f}"
            )
            if value != value:
                raise Diverged("the loss is not a number: take the last checkpoint and lower RATES")
        if saving():
            checkpoint(flow, share)
    checkpoint(flow, 1.0)
