"""One picture from a running ComfyUI: check the request against what the server has, upload, queue, show progress,
download.

Used by generate.py and demo.py. Needs aiohttp and tqdm. Not covered: batches, and more than one picture per call.
"""

import asyncio
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import api_workflow
from comfy_client import ComfyError

SAMPLER = "SamplerCustomAdvanced"


@dataclass(frozen=True)
class Picture:
    """data: the PNG file. reports: what the report node measured, one dict per run of the sampler. seconds: from
    queueing to the end.
    """

    data: bytes
    text: str
    reports: list
    seconds: float

    @property
    def backend(self):
        return ", ".join(dict.fromkeys(report["backend"] for report in self.reports))

    @property
    def seconds_per_step(self):
        """Of the last sampling, from its first forward pass on; None if nothing was sampled."""
        return self.reports[-1].get("seconds_per_step") if self.reports else None

    @property
    def calls(self):
        return sum(report["calls"] for report in self.reports)


class ProgressBar:
    """Shows the node at work and the sampler's steps on stderr."""

    def __init__(self):
        self.bar = tqdm(total=1, file=sys.stderr, unit="step", desc="Waiting")

    def __call__(self, progress):
        if progress.value is None:
            self.bar.set_description(progress.title, refresh=False)
            if progress.class_type == SAMPLER:
                self.bar.reset()  # so that the rate does not count the loading
            self.bar.refresh()
        elif progress.class_type == SAMPLER:
            self.bar.total, self.bar.n = progress.total, progress.value
            self.bar.refresh()

    def close(self):
        self.bar.close()


async def draw(client, settings, models=None, images=()):
    """Draw one picture.

    settings: a PictureSettings whose references and models are still empty; images: files to upload as references;
    models: {folder under models/: file or name}, matched against the server's lists. Returns a Picture.
    """
    await check_choice(client, "Flux2SelectAttention", "backend", settings.backend)
    names = await match_models(client, models or {})
    references = [await client.upload_image(image) for image in images]
    workflow = api_workflow.fill(dataclasses.replace(settings, models=names, references=tuple(references)))
    bar = ProgressBar()
    try:
        result = await client.run(workflow, bar)
    finally:
        bar.close()
    return await picture(client, result)


async def picture(client, result):
    images = result.images()
    if not images:
        raise ComfyError("The job finished without a picture; the server may have saved it elsewhere.")
    text = "\n".join(str(line) for line in result.collect("text"))
    return Picture(await client.download(images[0]), text, result.collect("flux2_attention"), result.seconds)


async def check_choice(client, node, name, value):
    known = await client.choices(node, name)
    if value not in known:
        raise ComfyError(f"Unknown attention {name} {value!r}. {client.url} knows: {', '.join(known)}.")


async def match_models(client, wanted):
    """{folder: name on the server} for all three model files; one that is not wanted by name keeps the workflow's."""
    names = {**api_workflow.default_models(), **{folder: str(name) for folder, name in wanted.items() if name}}
    return {
        folder: match(names[folder], await client.choices(loader, key), folder, client.url)
        for folder, (loader, key) in api_workflow.LOADERS.items()
    }


def match(wanted, available, folder, url):
    """A name as the server lists it, or the base name of one entry."""
    if wanted in available:
        return wanted
    alike = [name for name in available if Path(name.replace("\\", "/")).name == Path(wanted).name]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise ComfyError(
            f"{Path(wanted).name} is in several places of models/{folder} at {url}: {', '.join(alike)}. Give one "
            "of these names."
        )
    raise ComfyError(
        f"{url} has no {Path(wanted).name} in models/{folder}. It has: {', '.join(available) or 'no file there'}."
    )


def draw_all(make_client, requests):
    """Draw several requests, each (settings, models, images), one after the other over one session. Returns the
    Pictures.
    """

    async def work():
        async with make_client() as client:
            return [await draw(client, *request) for request in requests]

    return asyncio.run(work())
