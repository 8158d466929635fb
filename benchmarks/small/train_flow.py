"""Training of transformer and text encoder together: flow matching on scenes and edits, then guidance distilled from their own average.

  x = (1 - s) * latent + s * noise, target velocity noise - latent; s from a shifted logit-normal distribution (Esser et al. 2024).

The schedule is a function of `progress`, 0 to 1 over all runs together: short text padding first, the 512 rows of inference at the end; the
guidance input is 1 until GUIDED, after which half of each batch learns what classifier-free guidance of the average model would give.
"""
import traceback

import torch
from torch.nn import functional as F

from . import captions, scenes
from .encoder import left_padded
from .optimiser import Optimiser
from .progress import Average, Clock, Every, Mean, log
from .transformer import positions, tokens

ROWS = 512  # text rows that ComfyUI feeds the transformer (model_base.Flux2.extra_conds)
FULL_ROWS, GUIDED, DECAY = 0.6, 0.5, 0.55  # progress from which: 512 rows, guidance, the learning rate falls
RATES, WARM = (3e-3, 1.5e-3), 100  # learning rates of Muon and Adam; steps of warming up
DROPPED = 0.1  # share of empty prompts
SHIFT, UNIFORM = 3.0, 0.1  # shift of the noise levels towards more noise; share of them that is uniform
GUIDANCE, STRENGTH = (1.0, 6.0), 0.5  # range of the guidance input; classifier-free scale is 1 + (guidance - 1) * STRENGTH
REUSED = 8  # how often a drawn picture is used, each time with another caption and other noise
EDITS = 3  # every third step trains edits


def velocity(models, noisy, reference, prompt, time, guidance, rows):
    """(B, N, 128) velocity. `noisy` and `reference` (or None) are image tokens of square pictures, `prompt` is (ids, lengths)."""
    ids, lengths = prompt
    text = left_padded(models["text_encoder"](ids), lengths, rows)
    side = int(noisy.shape[1] ** 0.5)
    rotation = _rotation(rows, side, reference is not None, noisy.device)
    image = noisy if reference is None else torch.cat([noisy, reference], dim=1)
    return models["transformer"](image, text, time, guidance, rotation)[:, :noisy.shape[1]].float()


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


class Pool:
    """A fixed number of encoded scenes (or pairs before and after an edit), of which some are drawn anew at every step."""

    def __init__(self, rows, edits, encode, generator):
        self.rows, self.edits, self.encode, self.generator = rows, edits, encode, generator
        self.scenes, self.how, self.before, self.after = self._new(rows)

    def _new(self, rows):
        """(scenes, (task, target, colour), tokens before, tokens after); without edits the middle two are empty."""
        table = scenes.sample(rows, self.generator, for_edits=self.edits)
        if not self.edits:
            return table, [], None, self.encode(table)
        edited, *how = scenes.edit(table, self.generator)
        return table, how, self.encode(table), self.encode(edited)

    def refresh(self, rows):
        table, how, before, after = self._new(rows)
        index = torch.randint(self.rows, (rows,), generator=self.generator, device=self.generator.device)
        self.scenes.put(index, table)
        for old, new in zip((*self.how, self.before, self.after), (*how, before, after)):
            if old is not None:
                old[index] = new

    def draw(self, rows):
        """(phrases (B, S), reference tokens or None, latent tokens)."""
        index = torch.randint(self.rows, (rows,), generator=self.generator, device=self.generator.device)
        table, latent = self.scenes[index], self.after[index].float()
        if not self.edits:
            return captions.describe(table, self.generator)[0], None, latent
        phrases = captions.instruct(table, *(value[index] for value in self.how), self.generator)
        return phrases, self.before[index].float(), latent


def encoder_of(autoencoder, painter, autocast, chunk):
    """scenes -> latent tokens (B, 256, 128) in bf16."""
    @torch.no_grad()
    def encode(table):
        parts = []
        for start in range(0, len(table), chunk):
            pixels = scenes.draw(table[start:start + chunk], painter=painter)
            with autocast():
                parts.append(tokens(autoencoder.encode(pixels)).bfloat16())
        return torch.cat(parts)
    return encode


class Flow:
    """The state of the training: two models, their averages, pools of latents and the optimiser."""

    def __init__(self, models, copies, encode, generator, batch, pool, autocast):
        self.models, self.generator, self.autocast, self.batch = models, generator, autocast, batch
        self.average = Average(models, copies)
        self.ids = captions.Ids(generator.device)
        self.pools = [Pool(max(pool // (1 + edits), 8), edits, encode, generator) for edits in (False, True)]
        self.optimiser = optimiser(models)
        self.steps = self.seen = 0

    def step(self, progress):
        """One step; returns the loss, not yet waited for."""
        edits = self.steps % EDITS == EDITS - 1
        rows = ROWS if progress >= FULL_ROWS else captions.LONGEST
        length = rows + (512 if edits else 256)
        batch = max(2, self.batch * (captions.LONGEST + 256) // length // 16 * 16 or self.batch)
        pool = self.pools[edits]
        pool.refresh(max(1, batch // REUSED))
        with self.autocast():
            loss = self.loss(pool, batch, rows, progress >= GUIDED)
        loss.backward()
        self.steps, self.seen = self.steps + 1, self.seen + batch
        self.optimiser.step(min(1.0, self.steps / WARM) * min(1.0, 0.02 + (1 - progress) / (1 - DECAY)))
        self.average.update()
        return loss

    def forget_step(self):
        """After a step that failed: no gradients, half the batch."""
        for model in self.models.values():
            model.zero_grad(set_to_none=True)
        self.batch = max(2, self.batch // 2)
        if self.generator.device.type == "cuda":
            torch.cuda.empty_cache()

    def loss(self, pool, batch, rows, guided):
        phrases, reference, latent = pool.draw(batch)
        noise = torch.randn(latent.shape, generator=self.generator, device=latent.device)
        time, guidance, target = noise_levels(batch, self.generator), torch.ones(batch, device=latent.device), noise - latent
        noisy = latent + time[:, None, None] * target
        dropped = torch.rand(batch, generator=self.generator, device=latent.device) < DROPPED
        if guided:
            half = batch // 2
            dropped[:half] = False
            guidance[:half] = torch.empty(half, device=latent.device).uniform_(*GUIDANCE, generator=self.generator)
            target = torch.cat([self.guided_target(noisy[:half], None if reference is None else reference[:half], phrases[:half],
                                                   time[:half], guidance[:half], rows), target[half:]])
        found = velocity(self.models, noisy, reference, self.ids(phrases, dropped), time, guidance, rows)
        return F.mse_loss(found, target)

    @torch.no_grad()
    def guided_target(self, noisy, reference, phrases, time, guidance, rows):
        """Classifier-free guidance by the average model: empty prompt plus a multiple of the prompt's difference."""
        dropped = torch.arange(2 * len(noisy), device=noisy.device) >= len(noisy)
        twice = lambda x: None if x is None else torch.cat([x, x])
        both = velocity(self.average.models, twice(noisy), twice(reference), self.ids(twice(phrases), dropped), twice(time),
                        torch.ones_like(twice(time)), rows)
        prompted, empty = both.chunk(2)
        return empty + (1 + (guidance - 1) * STRENGTH)[:, None, None] * (prompted - empty)


def optimiser(models):
    """Muon for the matrices inside blocks and layers, Adam for the rest."""
    named = {f"{kind}.{name}": value for kind, model in models.items() for name, value in model.named_parameters()}
    inner = {name for name, value in named.items() if value.ndim == 2 and ("_blocks." in name or ".layers." in name)}
    return Optimiser([named[name] for name in inner], [value for name, value in named.items() if name not in inner], RATES)


class Diverged(RuntimeError):
    """The loss is no longer a number; the last checkpoint is still good."""


def train(flow, seconds, first, last, checkpoint, to_eager):
    """Train for `seconds`, over which progress goes from `first` to `last`. `checkpoint(flow, progress)` is called every two minutes and at the end.
    If a step fails, `to_eager` undoes compilation and the batch is halved, once each time, at most twice: a run is not lost to a compiler."""
    clock, report, saving, mean, failures = Clock(seconds), Every(10), Every(120), Mean(), 0
    while not clock.over:
        progress = first + (last - first) * clock.share
        try:
            mean.add(flow.step(progress))
        except Exception:  # the compiler, its kernels and the allocator raise many kinds
            failures += 1
            if failures > 2:
                raise
            log(f"step {flow.steps} failed; going on without compilation and with half the batch\n{traceback.format_exc(limit=-4)}")
            to_eager()
            flow.forget_step()
        if report():
            loss = mean.read()
            log(f"flow {clock.elapsed:5.0f} s  progress {progress:.3f}  step {flow.steps:6d}  {flow.seen / clock.elapsed:6.0f} pictures/s  loss {loss:.4f}")
            if loss != loss:
                raise Diverged("the loss is not a number: take the last checkpoint and lower RATES")
        if saving():
            checkpoint(flow, progress)
    checkpoint(flow, last)
