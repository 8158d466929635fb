"""Training of the small autoencoder: scenes and smooth noise through a latent of few dimensions, with noise added to
it.

The 32 latent channels span only RANK dimensions: their weights stay projected on a fixed subspace in which every
channel has an equal part. A latent is normalised by the statistics of the batch, gets noise of a random strength, and
is decoded. Noise and normalisation do the work of a KL term: scale and smoothness of the latent are fixed by them, and
the decoder forgives the errors that a diffusion model makes.
"""

import torch
from torch.nn import functional as F

from . import scenes
from .autoencoder import EPSILON, LATENT
from .optimiser import Optimiser
from .progress import Clock, Every, Mean, log

RANK, NOISE = 8, 0.5  # dimensions of the latent; the strongest noise, where the latent's deviation is 1
NOISE_PICTURES = 0.1  # share of smooth noise among the pictures
CROP, CROP_SHARE = 128, 0.55  # the first share of the time goes to crops
RATES, WARM = (1e-3, 2e-3), 30  # learning rates of Muon and Adam; steps of warming up


def projection(device):
    """(32, 32) projection on the first RANK rows of a Hadamard matrix."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < LATENT:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix[:, :RANK] @ matrix[:, :RANK].T / LATENT


@torch.no_grad()
def project(model, onto):
    """Keep what the encoder writes and the decoder reads in the subspace."""
    write, read = model.encoder.quant_conv, model.decoder.post_quant_conv
    write.weight[:LATENT] = (onto @ write.weight[:LATENT].flatten(1)).view_as(write.weight[:LATENT])
    write.bias[:LATENT] = onto @ write.bias[:LATENT]
    read.weight.copy_((read.weight.flatten(1) @ onto).view_as(read.weight))


def smooth_noise(rows, size, generator):
    """Pictures (B, 3, size, size) of coarse noise, so that the autoencoder knows more than eight colours and their
    edges.
    """
    coarse = torch.rand(rows, 3, 8, 8, generator=generator, device=generator.device) * 2.6 - 1.3
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


def pictures(rows, size, generator, painter):
    """Training pictures (B, 3, size, size) in -1..1: scenes, hats among them, cropped if size is less than 256, and
    noise.
    """
    noise = max(1, int(rows * NOISE_PICTURES))
    table = scenes.sample(rows - noise, generator)
    table.hat = torch.where(scenes.Dice(generator).chance(0.2, len(table)), torch.zeros_like(table.hat), table.hat)
    whole = scenes.draw(table, painter=painter)
    y, x = (
        scenes.Dice(generator).below(257 - size, len(table), 1) + torch.arange(size, device=whole.device)
        for _ in range(2)
    )
    cropped = (
        whole
        if size == 256
        else whole[
            torch.arange(len(table), device=whole.device)[:, None, None, None],
            torch.arange(3, device=whole.device)[:, None, None],
            y[:, None, :, None],
            x[:, None, None, :],
        ]
    )
    return torch.cat([cropped, smooth_noise(noise, size, generator)])


def loss_of(model, pixels, generator):
    """Scalar loss of one batch: absolute and squared error of the pixels, absolute error of their differences."""
    folded = model.folded(pixels).float()
    variance, mean = torch.var_mean(folded, dim=(0, 2, 3), keepdim=True, correction=0)
    scale = (variance + EPSILON).sqrt()
    strength = NOISE * torch.rand(len(pixels), 1, 1, 1, generator=generator, device=pixels.device)
    noise = torch.randn(folded.shape, generator=generator, device=pixels.device)
    drawn = model.decoder(F.pixel_shuffle((folded - mean) + scale * strength * noise + mean, 2))
    error = drawn.float() - pixels
    return (
        error.abs().mean() + error.square().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    )


def optimiser(model):
    """Muon for inner convolutions, Adam for the ends, the norms and the biases."""
    ends = ("conv_in", "conv_out", "quant_conv")
    inner = {
        name for name, value in model.named_parameters() if value.ndim == 4 and not any(end in name for end in ends)
    }
    named = dict(model.named_parameters())
    return Optimiser(
        [named[name] for name in inner], [value for name, value in named.items() if name not in inner], RATES
    )


def train(model, seconds, batch, generator, painter, autocast):
    """Train `model` in place for `seconds`; `batch` pictures of 256 x 256, four times as many crops."""
    onto, steps = projection(generator.device), optimiser(model)
    clock, report, mean, count = Clock(seconds), Every(15), Mean(), 0
    torch.backends.cudnn.benchmark = True  # two sizes of batch only; off again below, where there are many
    project(model, onto)
    while not clock.over:
        cropping = clock.share < CROP_SHARE
        pixels = pictures(batch * 2 if cropping else batch, CROP if cropping else 256, generator, painter)
        with autocast():
            loss = loss_of(model, pixels, generator)
        loss.backward()
        count += 1
        steps.step(min(1.0, count / WARM) * min(1.0, 0.02 + 2 * (1 - clock.share)))
        project(model, onto)
        mean.add(loss)
        if report():
            log(
                f"autoencoder {clock.elapsed:5.0f} s  step {count:5d}  {'crops' if cropping else 'whole'}  loss "
                f"{mean.read():.4f}"
            )
    torch.backends.cudnn.benchmark = False
    measure(model, batch, generator, painter, autocast)
    log(f"autoencoder done: {count} steps; {quality(model, min(batch, 16), generator, painter, autocast)}")


@torch.no_grad()
def measure(model, batch, generator, painter, autocast):
    """Store mean and variance of the latents of scenes, eight batches of them (two small ones in a smoke run)."""
    batches = 8 if batch > 8 else 2
    with autocast():
        latents = torch.cat(
            [
                model.folded(scenes.draw(scenes.sample(batch, generator), painter=painter)).float()
                for _ in range(batches)
            ]
        )
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    model.bn.running_mean.copy_(mean)
    model.bn.running_var.copy_(variance)
    model.bn.num_batches_tracked.fill_(batches)


@torch.no_grad()
def quality(model, rows, generator, painter, autocast):
    """One line: mean absolute error in steps of 1/255, clean and with noise of 0.3 on the latent."""
    pixels = scenes.draw(scenes.sample(rows, generator), painter=painter)
    with autocast():
        latent = model.encode(pixels)
        noisy = latent + 0.3 * torch.randn(latent.shape, generator=generator, device=latent.device)
        clean, rough = ((model.decode(z.float()).float().clamp(-1, 1) - pixels).abs() * 127.5 for z in (latent, noisy))
    worst = clean.mean(1).flatten(1).median(1).values.max()
    return f"error {clean.mean():.2f}/255, with latent noise {rough.mean():.2f}, worst background {worst:.2f}"
