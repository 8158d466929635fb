"""The small FLUX.2 that draws (benchmarks/small): its training code computes what ComfyUI computes, its pictures,
captions and judge are right.

Models here have random weights unless a test says "shipped".
"""

import contextlib
import subprocess
import sys

import pytest
import torch

import pack

sys.path.insert(0, str(pack.ROOT / "benchmarks"))
from small import (
    captions,
    encoder,
    files,
    judge,
    sampling,
    scenes,
    tokens,
    train_autoencoder,
    train_flow,
    train_text,
    transformer,
)  # noqa: E402
from small.autoencoder import Autoencoder  # noqa: E402

SIZES = transformer.Sizes(hidden=256, double=1, single=2)


def relative_error(value, reference):
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def shaken(model, scale=0.02):
    """A fresh model with nothing left at zero, rounded to bf16 as the files are."""
    with torch.no_grad():
        for number, value in enumerate(model.parameters()):
            value.add_(torch.randn(value.shape, generator=generator(number)) * scale)
            value.copy_(value.bfloat16())
        for name, value in model.named_buffers():
            if value.dtype == torch.float32:
                value.copy_((value + torch.rand(value.shape, generator=generator(7)) * 0.5).bfloat16())
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(folder, {kind: model}) of small models with the same random weights in both."""
    torch.manual_seed(3)
    models = {
        "transformer": transformer.Transformer(SIZES),
        "text_encoder": encoder.TextEncoder(encoder.Sizes(tokens.size())),
        "autoencoder": Autoencoder(),
    }
    models = {kind: shaken(model.eval()) for kind, model in models.items()}
    folder = tmp_path_factory.mktemp("weights")
    files.save(folder, models, {"recipe": "random"})
    return folder, models


@pytest.fixture(scope="module")
def load(comfy):
    from flux2_pack.flux2.loading import load

    return load


# --- the training code against ComfyUI
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize("references", [0, 1])
@torch.inference_mode()
def test_transformer_computes_what_comfyui_computes(load, weights, references):
    folder, models = weights
    theirs = load.load_model(folder / files.NAMES["transformer"]).model.diffusion_model.to(
        device="cpu", dtype=torch.float32
    )
    latent, reference = (torch.randn(2, 128, 6, 6, generator=generator(seed)) for seed in (1, 2))
    text = torch.randn(2, 512, 192, generator=generator(3))
    text[:, :480] = 0
    time, guidance = torch.tensor([0.9, 0.3]), torch.tensor([4.0, 1.0])
    expected = theirs(latent, time, context=text, guidance=guidance, ref_latents=[reference] * references)
    image = torch.cat([transformer.tokens(latent)] + [transformer.tokens(reference)] * references, dim=1)
    found = models["transformer"](image, text, time, guidance, transformer.positions(512, 6, 6, references))
    assert relative_error(transformer.picture(found[:, :36], 6), expected) < 1e-5


@torch.inference_mode()
def test_text_encoder_and_tokenizer_give_what_comfyui_gives(load, weights):
    folder, models = weights
    clip = load.load_text_encoder(folder / files.NAMES["text_encoder"])
    phrases, _ = captions.describe(scenes.sample(3, generator()), generator())
    ids, lengths = captions.Ids("cpu")(phrases)
    ours = encoder.left_padded(models["text_encoder"](ids), lengths, 96)
    for row, phrase in enumerate(phrases.tolist()):
        found = clip.tokenize(captions.text(phrase))
        assert [entry[0] for entry in found["mistral3_24b"][0]] == ids[row, : lengths[row]].tolist()
        theirs = clip.encode_from_tokens(found)[0]
        assert relative_error(ours[row, 96 - lengths[row] :], theirs) < 1e-5
        assert not ours[row, : 96 - lengths[row]].any()


@torch.inference_mode()
def test_autoencoder_computes_what_comfyui_computes(load, weights):
    folder, models = weights
    vae = load.load_vae(folder / files.NAMES["autoencoder"], "fp32")
    pixels = scenes.draw(scenes.sample(1, generator()), 64, 96)
    latent = models["autoencoder"].encode(pixels)
    assert latent.shape == (1, 128, 4, 6)
    assert relative_error(vae.encode((pixels.movedim(1, -1) + 1) / 2), latent) < 1e-4
    drawn = ((models["autoencoder"].decode(latent) + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert (vae.decode(latent) - drawn).abs().max() < 1e-4


@torch.inference_mode()
def test_noise_levels_of_sampling_are_those_of_comfyui(comfy):
    from comfy_extras.nodes_flux import get_schedule

    for steps, count in ((20, 256), (8, 1024)):
        assert torch.allclose(
            sampling.noise_schedule(steps, count), torch.as_tensor(get_schedule(steps, count)), atol=1e-6
        )


@torch.inference_mode()
def test_sampling_draws_what_comfyui_draws(load, weights):
    """Whole path, tokenizer to pixels, with a reference picture and guidance, three steps of Euler's method."""
    import comfy.sample
    import comfy.samplers
    import node_helpers

    folder, models = weights
    model, clip, vae = (
        getattr(load, f"load_{kind}")(folder / files.NAMES[name])
        for kind, name in (("model", "transformer"), ("text_encoder", "text_encoder"), ("vae", "autoencoder"))
    )
    model.model.diffusion_model.to(torch.float32)
    table = scenes.sample(1, generator(), for_edits=True)
    edited, *how = scenes.edit(table, generator())
    phrases = captions.instruct(table, *how, generator())
    reference, noise = (
        models["autoencoder"].encode(scenes.draw(table, 64, 64)),
        torch.randn(1, 128, 4, 4, generator=generator()),
    )
    ours = sampling.draw(
        models, captions.Ids("cpu")(phrases), transformer.tokens(reference), transformer.tokens(noise), steps=3
    )
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize(captions.text(phrases[0].tolist())))
    prompt = node_helpers.conditioning_set_values(
        prompt, {"guidance": sampling.GUIDANCE, "reference_latents": [reference]}
    )
    sampled = comfy.sample.sample_custom(
        model,
        noise,
        1.0,
        comfy.samplers.sampler_object("euler"),
        sampling.noise_schedule(3, 16),
        prompt,
        prompt,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )
    # ComfyUI may compute in bf16 where ours is float32
    assert relative_error((vae.decode(sampled) * 2 - 1).movedim(-1, 1), ours) < 0.02


# --- pictures and captions
# -----------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_scenes_and_held_out_ones_never_come():
    first, second = (scenes.sample(400, generator(5)) for _ in range(2))
    assert torch.equal(first.kind, second.kind) and torch.equal(
        scenes.draw(first[:2], 64, 64), scenes.draw(second[:2], 64, 64)
    )
    assert (
        not scenes.is_held_out(first).any() and scenes.is_held_out(scenes.sample(50, generator(), held_out=True)).all()
    )


def test_held_out_depends_on_the_set_of_objects_alone():
    table = scenes.sample(200, generator(), held_out=True, counts=(0, 0, 1))
    turned = table[torch.arange(200)]
    turned.kind, turned.colour, turned.cell = table.kind.flip(1), table.colour.flip(1), (table.cell + 1) % 9
    assert scenes.is_held_out(turned).all()


def test_an_edit_leaves_the_rest_of_the_picture_alone():
    table = scenes.sample(60, generator(), for_edits=True)
    edited, task, target, _ = scenes.edit(table, generator())
    changed = (scenes.draw(table) - scenes.draw(edited)).abs().amax(1) > 0  # (B, 256, 256)
    assert changed.flatten(1).any(1).all() and {0, 1, 2} == set(task.tolist())
    column = scenes.centres(table)[torch.arange(60), target, 0]
    x = torch.arange(256) + 0.5
    far = (x - column[:, None]).abs() > 45
    assert not (changed.any(1) & far).any()


def test_relations_and_places_in_captions_hold():
    table = scenes.sample(300, generator())
    phrases, relation = captions.describe(table, generator(), full=True)
    centre = scenes.centres(table)
    for row in range(300):
        text = captions.text(phrases[row].tolist())
        assert all(
            f"{list(scenes.COLOURS)[table.colour[row, n]]} {scenes.KINDS[table.kind[row, n]]}" in text
            for n in range(table.count[row])
        )
        if table.count[row] > 1:
            words = captions.RELATIONS[relation[row]]
            assert any(word in text for word in words)
            axis, sign = [(1, 1), (1, -1), (0, 1), (0, -1)][relation[row]]
            assert sign * (centre[row, 1, axis] - centre[row, 0, axis]) > 60


def test_captions_of_training_say_everything_that_is_not_always_the_same():
    """The same caption, the same picture, but for the distance from the middle of the cells."""
    table = scenes.sample(3000, generator(), cats=False, counts=(6, 3, 1))
    table.style[:], table.ground[:], table.size[:] = scenes.GRADIENT, torch.tensor([1, 2]), 2 * (table.size > 0)
    table, phrases = captions.compose(table, generator())
    looks, pictures = (
        {},
        [
            (
                *_shown(table, row),
                int(table.style[row]),
                *table.ground[row, : 1 if table.style[row] == scenes.PLAIN else 2].tolist(),
            )
            for row in range(3000)
        ],
    )
    for phrase, picture in zip(phrases.tolist(), pictures):
        assert looks.setdefault(captions.text(phrase).lstrip("aA").removesuffix("."), picture) == picture
    assert len(looks) < 2950  # many captions came twice


def _shown(table, row):
    fields = torch.stack([table.kind, table.colour, table.size, table.cell], dim=-1)
    return [tuple(values) for values in fields[row, : table.count[row]].tolist()]


def test_relations_in_captions_of_training_hold_and_cells_are_never_shared():
    table, phrases = captions.compose(scenes.sample(1000, generator()), generator())
    centre = scenes.centres(table)
    for row, phrase in enumerate(phrases.tolist()):
        cells = table.cell[row, : table.count[row]].tolist()
        assert len(set(cells)) == len(cells)
        for relation, words in enumerate(captions.RELATIONS):
            if any(captions.NUMBER[word] in phrase for word in words):
                axis, sign = [(1, 1), (1, -1), (0, 1), (0, -1)][relation]
                assert sign * (centre[row, 1, axis] - centre[row, 0, axis]) > 60


def test_instructions_name_what_the_edit_does():
    before, after, phrases, (task, target, colour) = train_text.edit_captions(300, generator())
    said = train_text.said_of_edits(before, phrases, task, target, colour)
    names = list(scenes.COLOURS)
    for row, phrase in enumerate(phrases.tolist()):
        text, new = captions.text(phrase), said["new"][row].item()
        assert scenes.KINDS[said["kind"][row].item()] in text and (new == train_text.UNSAID or f" {names[new]}" in text)
        if task[row] == scenes.HAT and new == train_text.UNSAID:
            assert after.hat_colour[row] == scenes.usual_hat(before)[row] and not any(
                f" {name} hat" in text for name in names
            )


def test_edits_can_be_made_of_some_tasks_and_numbers_of_shapes_alone():
    before, after, _, (task, *_) = train_text.edit_captions(200, generator(), counts=(0, 1, 3), tasks=(1, 4, 0))
    assert set(before.count.tolist()) == {2, 3} and set(task.tolist()) == {scenes.RECOLOUR, scenes.REMOVE}
    assert (task == scenes.REMOVE).sum() > 2 * (task == scenes.RECOLOUR).sum() and (before.count == 3).sum() > (
        before.count == 2
    ).sum()


def test_no_prompt_is_longer_than_the_rows_that_training_starts_with():
    ids = captions.Ids("cpu")
    lengths = [
        ids(phrases)[1].max()
        for phrases in (
            captions.describe(scenes.sample(4000, generator()), generator(), full=True)[0],
            captions.describe(scenes.sample(4000, generator()), generator())[0],
            captions.compose(scenes.sample(4000, generator()), generator())[1],
        )
    ]
    assert max(lengths) <= captions.LONGEST


def test_any_text_can_be_tokenised_and_read_back():
    from flux2_pack.flux2.loading import tekken

    ready = tekken.build(tokens.tekken(), "the small tokenizer")
    text = "Naïve café: 42 zebras, \u732b & a red circle?!\n"
    assert ready.decode(ready.encode(text).ids) == text
    assert ready.get_vocab_size() == tokens.size()


# --- the judge
# -----------------------------------------------------------------------------------------------------------


def judged(table, relation, pixels):
    return [
        judge.judge(
            picture,
            judge.wanted(table, row),
            int(relation[row]),
            int(table.cell[row, 0]) if table.count[row] == 1 else None,
        )
        for row, picture in enumerate(judge.as_pictures(pixels))
    ]


@pytest.fixture(scope="module")
def clean():
    """(scenes, relations of their captions, pictures)"""
    table = scenes.sample(60, generator(3), cats=False, held_out=True)
    return table, captions.describe(table, generator(3), full=True)[1], scenes.draw(table)


def worse(pixels, noise=0.05):
    """A little out of focus and noisy, as a model draws."""
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return blurred + noise * torch.randn(pixels.shape, generator=generator())


@pytest.mark.parametrize("change", [lambda pixels: pixels, worse])
def test_judge_accepts_drawn_scenes(clean, change):
    table, relation, pixels = clean
    verdicts = judged(table, relation, change(pixels))
    assert all(verdict.shapes and verdict.relation is not False and verdict.place is not False for verdict in verdicts)
    assert sum(verdict.relation is not None for verdict in verdicts) == (table.count > 1).sum()


def test_judge_refuses_other_colours_kinds_counts_and_places(clean):
    table, relation, _ = clean
    rows = torch.arange(len(table))
    recoloured, reshaped, moved = table[rows], table[rows], table[rows]
    recoloured.colour = table.colour.roll(1, dims=1)
    recoloured.colour[table.count == 1] = (table.colour[table.count == 1] + 1) % len(scenes.COLOURS)
    reshaped.kind = (table.kind + 1) % scenes.SHAPES
    moved.cell = 8 - table.cell
    for wrong in (recoloured, reshaped):
        different = [
            row for row in range(len(table)) if sorted(judge.wanted(table, row)) != sorted(judge.wanted(wrong, row))
        ]
        verdicts = judged(table, relation, scenes.draw(wrong))
        assert len(different) > 20 and not any(verdicts[row].shapes for row in different)
    verdicts = judged(table, relation, scenes.draw(moved))
    assert all(verdict.shapes for verdict in verdicts)
    assert not any(verdict.relation for verdict in verdicts)
    assert not any(verdict.place for verdict, cell in zip(verdicts, table.cell[:, 0]) if cell != 4)


def test_swapped_colours_are_wrong():
    """The same two colours and the same two kinds, the other way round."""
    table = scenes.sample(40, generator(4), counts=(0, 1, 0), cats=False)
    table = table[(table.kind[:, 0] != table.kind[:, 1]).nonzero()[:, 0]]
    swapped = table[torch.arange(len(table))]
    swapped.colour = table.colour[:, [1, 0, 2]]
    relation = torch.full((len(table),), -1)
    assert not any(verdict.shapes for verdict in judged(table, relation, scenes.draw(swapped)))


def test_one_shape_missing_or_too_many_is_wrong(clean):
    table, relation, _ = clean
    fewer, more = table[(table.count > 1).nonzero()[:, 0]], table[(table.count < 3).nonzero()[:, 0]]
    missing = fewer[torch.arange(len(fewer))]
    missing.shown = fewer.shown & (torch.arange(scenes.OBJECTS) > 0)
    extra = more[torch.arange(len(more))]
    extra.shown = torch.ones_like(more.shown)
    for asked, drawn in ((fewer, missing), (more, extra)):
        assert not any(verdict.shapes for verdict in judged(asked, torch.full((len(asked),), -1), scenes.draw(drawn)))


def judged_edits(pixels, after):
    pairs = zip(judge.as_pictures(pixels), judge.as_pictures(scenes.draw(after)))
    return [
        judge.judge_edit(picture, result, judge.cut_colours(after, row)) for row, (picture, result) in enumerate(pairs)
    ]


def test_judge_of_edits_accepts_the_drawn_result_and_nothing_else():
    before = scenes.sample(40, generator(5), cats=False, for_edits=True)
    after, task, target, colour = scenes.edit(before, generator(5))
    assert all(judged_edits(worse(scenes.draw(after)), after))
    assert not any(judged_edits(scenes.draw(before), after))
    other = scenes.apply(before, task, target, (colour + 1) % len(scenes.COLOURS))  # the right edit in a wrong colour
    assert not any(fine for fine, kind in zip(judged_edits(scenes.draw(other), after), task) if kind != scenes.REMOVE)


@pytest.mark.parametrize("field", ["kind", "size", "shown"])
def test_an_edit_that_touches_another_shape_is_wrong(field):
    before = scenes.sample(30, generator(6), counts=(0, 0, 1), cats=False, for_edits=True)
    colour = scenes._free_colour(before, scenes.Dice(generator()))
    after = scenes.apply(before, torch.full((30,), scenes.HAT), torch.zeros(30, dtype=torch.long), colour)
    touched, choices = after[torch.arange(30)], {"kind": scenes.SHAPES, "size": 3, "shown": 2}[field]
    getattr(touched, field)[:, 1] = (getattr(after, field)[:, 1].long() + 1) % choices
    assert not any(judged_edits(scenes.draw(touched), after))


def test_intervals_are_wilsons():
    low, high = judge.wilson(180, 200)
    assert (
        (round(low, 3), round(high, 3)) == (0.851, 0.934)
        and judge.wilson(0, 0) == (0.0, 1.0)
        and judge.wilson(10, 10)[1] == 1.0
    )


# --- training
# ------------------------------------------------------------------------------------------------------------


def test_the_latent_has_the_dimensions_that_training_leaves_it():
    model, onto = Autoencoder(), train_autoencoder.projection(torch.device("cpu"))
    train_autoencoder.project(model, onto)
    latent = model.encoder(torch.rand(1, 3, 64, 64))[0, :32].flatten(1)
    assert torch.linalg.matrix_rank(latent) == torch.linalg.matrix_rank(onto) == train_autoencoder.RANK
    before = [value.clone() for value in model.parameters()]
    train_autoencoder.project(model, onto)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, model.parameters()))


class Made:
    """Pool entries of 4 x 4 tokens, each picture of one value, with the text states of a random encoder."""

    def __init__(self):
        self.generator, self.autoencoder = generator(), Autoencoder()
        self.pictures = torch.randn(4, 1, 128, generator=generator(1)).expand(-1, 16, -1)

    def scenes(self, rows):
        text = torch.randn(rows, 8, 192, generator=generator(2))
        return {"latent": self.pictures[torch.arange(rows) % 4], "text": text, "weight": torch.ones(rows, 16)}

    def edits(self, rows):
        return self.scenes(rows) | {"reference": self.pictures[torch.arange(rows) % 4]}

    def nothing(self):
        return torch.zeros(1, 8, 192)


def small_flow(monkeypatch, **settings):
    torch.manual_seed(0)
    for name, value in ({"WARM": 10, "LONG": 1000} | settings).items():
        monkeypatch.setattr(train_flow, name, value)
    models = [transformer.Transformer(transformer.Sizes(128, 1, 1)) for _ in range(2)]
    return train_flow.Flow(*models, Made(), 4, 8, contextlib.nullcontext)


def test_training_steps_lower_the_loss(monkeypatch):
    flow = small_flow(monkeypatch)
    losses = [flow.step(0.1).item() for _ in range(60)]
    assert sum(losses[-6:]) < 0.6 * sum(losses[:6]), losses  # six: twice a scene, a scene and an edit
    assert flow.steps == 60 and all(value.isfinite().all() for value in flow.average.models["transformer"].parameters())


def test_guidance_moves_the_target_by_what_the_prompt_does(monkeypatch):
    flow = small_flow(monkeypatch)
    shaken(flow.average.models["transformer"])
    noisy, text, empty, time = (
        torch.randn(3, 16, 128),
        torch.randn(3, 512, 192),
        torch.zeros(1, 512, 192),
        torch.full((3,), 0.7),
    )
    moved = flow.effect(noisy, None, text, empty, time, torch.tensor([1.0, 3.0, 5.0]))
    of = lambda states: train_flow.velocity(
        flow.average.models["transformer"], noisy, None, states, time, torch.ones(3)
    )
    difference = of(text) - of(empty.expand_as(text))
    assert not moved[0].any() and relative_error(moved[1], 2 * train_flow.STRENGTH * difference[1]) < 1e-3
    assert relative_error(moved[2], 4 * train_flow.STRENGTH * difference[2]) < 1e-3


def test_the_weight_of_an_edit_does_not_tell_which_shape_it_changes():
    """Weight on the changed shape alone taught the model to change all of them."""
    before = scenes.sample(64, generator(3), (0, 1, 1), for_edits=True)
    weight, (_, task, target, _) = train_flow.touchable(before), scenes.edit(before, generator(4))
    place = (scenes.centres(before) / 16).long()  # the image token under each object's centre
    at_shapes = weight.gather(1, 16 * place[..., 1] + place[..., 0])
    assert (at_shapes[before.shown] == 1).all() and (weight.mean(1) < 0.7).all()
    hats, rows = place.gather(1, target[:, None, None].expand(-1, 1, 2))[:, 0], torch.arange(64)[task == scenes.HAT]
    assert (weight[rows, 16 * (hats[rows, 1] - 5) + hats[rows, 0]] == 1).all()  # five tokens up: in the cell above


def test_guidance_is_trained_on_scenes_alone(monkeypatch):
    flow = small_flow(monkeypatch)
    guided = []
    monkeypatch.setattr(
        flow, "effect", lambda noisy, reference, *_: (guided.append(reference is None), torch.zeros_like(noisy))[1]
    )
    for _ in range(6):
        flow.step(1.0 - 0.2)
    assert flow.kinds == [4, 2] and guided == [True] * 4


def test_the_loss_forgives_what_the_decoder_does_not_read():
    model = Autoencoder()
    train_autoencoder.project(model, train_autoencoder.projection(torch.device("cpu")))
    seen, error = train_flow.seen(model), torch.randn(1, 16, 128, generator=generator())
    assert round(seen.trace().item()) == 4 * train_autoencoder.RANK
    latent, unseen = torch.randn(1, 16, 128, generator=generator(2)), error - error @ seen
    with torch.no_grad():
        drawn = [
            model.decode(transformer.picture(tokens, 4)) for tokens in (latent, latent + unseen, latent + error @ seen)
        ]
    assert relative_error(drawn[1], drawn[0]) < 1e-3 < relative_error(drawn[2], drawn[0])
    weight = torch.ones(1, 16)
    assert torch.allclose(
        train_flow.weighted(unseen, weight, seen), train_flow.UNSEEN * unseen.square().mean(), rtol=1e-3
    )
    weight[0, :8] = 3
    half = torch.cat([error[:, :8], torch.zeros(1, 8, 128)], dim=1) @ seen
    assert torch.allclose(train_flow.weighted(half, weight, seen), 1.5 * half.square().mean(), rtol=1e-3)


def test_the_text_encoder_learns_what_captions_say(monkeypatch):
    """A shallow one, without the template, in twenty steps; the reader's classes are those of the scene."""
    monkeypatch.setattr(encoder, "LAYERS", 3)
    monkeypatch.setattr(encoder, "TAPS", (1, 2, 3))
    torch.manual_seed(0)
    model, ids = encoder.TextEncoder(encoder.Sizes(tokens.size())), captions.Ids("cpu")
    ids.before = ids.before[-1:]
    book = train_text.readers(192)
    steps = train_text.Optimiser(*train_text.halves({"text_encoder": model, "reader": book}), train_text.RATES)
    losses, dice = [], generator()
    for _ in range(20):
        lesson = train_text.Lesson(32, ids, dice)
        loss = lesson.loss(lesson.read(model, book))
        loss.backward()
        steps.step(1.0)
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
    train_text.tidy(model)
    assert not model(torch.full((1, 5), captions.PAD)).any()


def test_smoke_run_trains_resumes_and_exports_files_that_load(load, tmp_path):
    script = str(pack.ROOT / "benchmarks/train_small.py")
    first, second, shipped = (tmp_path / name for name in ("first", "second", "shipped"))
    run = lambda *arguments: (
        subprocess.run(
            [sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=300
        ).stdout
    )
    out = run("--smoke", "--out", first)
    assert all(line in out for line in ("autoencoder done", "text done", "check at 1.000")) and "failed" not in out
    out = run("--smoke", "--out", second, "--resume", first, "--autoencoder", pack.ROOT / "tests/data/small_flux2")
    assert "autoencoder done" not in out and "text done" not in out and "check at 1.000" in out and "failed" not in out
    progress = files.read_progress(second)
    assert (
        progress["runs"] == 2
        and progress["steps"] > files.read_progress(first)["steps"] > 0
        and (second / "sheet.png").stat().st_size > 0
    )
    same = [(folder / files.NAMES["text_encoder"]).read_bytes()[4096:] for folder in (first, second)]
    assert same[0][-1000000:] == same[1][-1000000:]
    run("--export", shipped, "--resume", second)
    assert files.metadata(shipped / files.NAMES["transformer"])["licence"] == "Apache-2.0"
    for kind, name in (("model", "transformer"), ("text_encoder", "text_encoder"), ("vae", "autoencoder")):
        getattr(load, f"load_{kind}")(shipped / files.NAMES[name])
