"""Help: a page for every node that ComfyUI's page shows, words that find every node, and errors that lead to the
section that explains them.

  bash scripts/test.sh tests/test_help.py

The errors are provoked through the pack's own code. Not covered: whether a page is a good one, and links on the web,
which need a published repository.
"""

import ast
import asyncio
import contextlib
import json
import re
import time
import urllib.request
from types import SimpleNamespace

import pytest

import browser
import torch

import make_help
import prompt_models
import small_models as maker
from flux2_pack.attention.errors import UserError
from flux2_pack.flux2 import error_links
from flux2_pack.flux2.checkpoints.header import CheckpointError
from pack import ROOT
from make_locales import LANGUAGES
from server_fixture import TEXT_FILE, run

PAGES, MOST_BYTES = ROOT / "web" / "docs", 60_000
TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text()
WHICH = ["Which one?", *(headings[0] for headings in make_help.HEADINGS.values())]
NO_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


@pytest.fixture(scope="module")
def nodes(comfy):
    """{node id: node class}, as ComfyUI gets them."""
    from flux2_pack import nodes

    extension = asyncio.run(nodes.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture(scope="module")
def infos(nodes):
    """{node id: its entry in ComfyUI's /object_info}."""
    return {name: node.GET_NODE_INFO_V1() for name, node in nodes.items()}


# --- pages -----------------------------------------------------------------------------------------------------------


def page_of(name):
    return (PAGES / f"{name}.md").read_text()


def displayed_names(info):
    """What the page calls the inputs and outputs of a node."""
    inputs = {
        name: options for kind in ("required", "optional") for name, options in info["input"].get(kind, {}).items()
    }
    return [
        (options[1] if len(options) > 1 else {}).get("display_name") or name for name, options in inputs.items()
    ] + list(info["output_name"])


def renamed_inputs(infos):
    """Names of inputs that the page shows under another one, in every node that has them."""
    shown = {}
    for info in infos.values():
        for kind in ("required", "optional"):
            for name, options in info["input"].get(kind, {}).items():
                display = (options[1] if len(options) > 1 else {}).get("display_name") or name
                shown.setdefault(name, set()).add(display)
    return {name for name, displays in shown.items() if name not in displays}


def test_docs_and_sentences_name_inputs_as_the_page_shows_them(infos):
    """Nobody finds an input `unsupported_calls` on a node that calls it otherwise. Lines about the API may say it."""
    hidden = renamed_inputs(infos)
    assert {"unsupported_calls", "memory", "edge_backend"} <= hidden
    marked = re.compile("|".join(rf"\*{name}\*|`{name}`|[Ii]nput {name}[ .,:]" for name in sorted(hidden)))
    wrong = [
        f"{file.name}:{number}: {found[0]}"
        for file in (ROOT / "docs").glob("*.md")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if "API" not in line and file.name not in ("design.md", "coming-from.md") and (found := marked.search(line))
    ]
    asked = re.compile("|".join(rf"[Ss]et {name.replace('_', '[_ ]')} to" for name in sorted(hidden)))
    wrong += [
        f"{file.relative_to(ROOT)}: {found[0]}"
        for folder in ("attention", "flux2", "nodes")
        for file in (ROOT / folder).rglob("*.py")
        if (found := asked.search(file.read_text()))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_node_has_a_page_and_every_page_a_node(nodes):
    assert {file.stem for file in PAGES.glob("*.md")} == set(nodes)


def test_pages_name_every_input_and_output(infos):
    lacking = {
        name: [shown for shown in displayed_names(info) if f"`{shown}`" not in page_of(name)]
        for name, info in infos.items()
    }
    assert not any(lacking.values()), lacking


def test_pages_name_nothing_that_the_node_does_not_have(infos):
    """What stands in front of the paragraphs of inputs and outputs."""
    for name, info in infos.items():
        rows = re.findall(r"^((?:\*\*`[^`]+`\*\*(?:, )?)+) –", page_of(name), re.M)
        assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == set(displayed_names(info)), name


def test_pages_begin_with_the_nodes_name_and_have_their_parts(infos):
    for name, info in infos.items():
        page = page_of(name)
        assert page.startswith(f"# {info['display_name']}\n"), name
        assert [f"## {part}" in page for part in ("Inputs", "Outputs", "Limits", "Related")] == [True] * 4, name


def test_pages_name_related_nodes_that_exist(infos):
    """In italics: nodes of this pack by their display name, with or without "(FLUX.2)"."""
    known = {info["display_name"].replace(" (FLUX.2)", "") for info in infos.values()}
    for name in infos:
        related = page_of(name).split("## Related")[1]
        named = set(re.findall(r"\*([^*]+)\*", related))
        assert named & known, name


def test_pages_have_no_tables_and_say_first_which_one_to_take():
    """ComfyUI's side panel is 300 pixels wide: a table there has one word a line."""
    pages = {file: file.read_text() for file in PAGES.rglob("*.md")}
    assert [file for file, text in pages.items() if re.search(r"^\|", text, re.M)] == []
    for file, text in pages.items():
        places = [text.index(heading) for heading in WHICH if heading in text]
        assert not places or places[0] < 200, file
    assert "## Which one?" in page_of("Flux2SelectAttention")


def test_every_page_is_there_in_every_language(nodes):
    """Made from locales/ by scripts/make_help.py, and as it would make them now."""
    wanted = make_help.pages()
    assert {(path.parent.name, path.stem) for path in wanted} == {(n, code) for n in nodes for code in LANGUAGES}
    assert {path for path in PAGES.glob("*/*.md")} == set(wanted)
    assert [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text] == []


def test_every_page_shows_its_node():
    assert [file.stem for file in sorted(PAGES.glob("*.md")) if not NO_PICTURE.search(file.read_text())] == []


def test_pictures_are_there_and_small():
    used = {name: file for file in PAGES.glob("*.md") for name in NO_PICTURE.findall(file.read_text())}
    files = {f"images/{file.name}": file for file in (PAGES / "images").iterdir()}
    assert set(used) == set(files)
    assert {name: file.stat().st_size for name, file in files.items() if file.stat().st_size > MOST_BYTES} == {}


OPEN_HELP = """
await app.loadGraphData({nodes: [], links: [], version: 0.4, last_node_id: 0, last_link_id: 0}, true, true, 'help');
const node = LiteGraph.createNode(args[0]);
node.pos = [600, 300];
app.graph.add(node);
app.canvas.deselectAll();
app.canvas.selectNode(node);
"""


def test_the_page_shows_them(shared_page, infos):
    """Select a node and press its info button, as the user does."""
    for name, info in infos.items():
        shared_page.js(OPEN_HELP, name)
        shared_page.wait_for("!!document.querySelector('[data-testid=info-button]')")
        shared_page.js("document.querySelector('[data-testid=info-button]').click()")
        shared_page.wait_for(
            "document.querySelector('.node-help-content h1')?.innerText === args[0]", arguments=[info["display_name"]]
        )
        shown = shared_page.js("return document.querySelector('.node-help-content').innerText")
        assert "Limits" in shown and all(name in shown for name in displayed_names(info)), name
        pictures = len(NO_PICTURE.findall(page_of(name)))
        loaded = (
            "[...document.querySelectorAll('.node-help-content img')].filter(image => image.complete && "
            "image.naturalWidth > 100).length"
        )
        shared_page.wait_for(f"{loaded} === args[0]", arguments=[pictures])


RUN_INFO = """
await app.loadGraphData({nodes: [], links: [], version: 0.4, last_node_id: 0, last_link_id: 0}, true, true, 'info');
const node = LiteGraph.createNode('Flux2ModelInfo');
app.graph.add(node);
node.widgets.find(({name}) => name === 'file_name').value = args[0];
"""


def test_model_info_shows_its_text_on_the_node(shared_page, model_files):
    """As its page says."""
    shared_page.js(RUN_INFO, f"vae/{model_files['vae'][0].name}")
    shared_page.run()
    shared_page.fit()
    shared_page.wait_for(
        "[...document.querySelectorAll('.flux2-report')]"
        ".some(box => box.innerText.includes('Goes into: Load FLUX.2 VAE'))"
    )


# --- search ----------------------------------------------------------------------------------------------------------

TYPED = [
    ("flash attention", "Flux2SelectAttention"),
    ("aiter", "Flux2SelectAttention"),
    ("rocm", "Flux2SelectAttention"),
    ("sage attention", "Flux2SelectAttention"),
    ("sage", "Flux2SelectAttention"),
    ("multi gpu", "Flux2SequenceParallel"),
]
ADD_BOX = "document.activeElement?.getAttribute('role') === 'combobox'"
RESULTS = "[...document.querySelectorAll('[data-testid=result-item]')].map(item => item.innerText)"
INDEX = """
const page = document.querySelector('#vue-app').__vue_app__.config.globalProperties;
const found = page.$pinia._s.get('nodeDef').nodeSearchService;
return Object.fromEntries(args[0].map(text => [text, found.searchNode(text, [], {limit: 64}).map(({name}) => name)]));
"""


def type_into_search(page, text):
    """Double-click the empty canvas and type; leaves the dialog open."""
    from selenium.webdriver.common.action_chains import ActionChains

    for _ in range(5):  # a dialog that is still closing swallows a click
        mouse = ActionChains(page.driver)
        mouse.w3c_actions.pointer_action.move_to_location(400, 900)
        mouse.double_click()
        mouse.perform()
        with contextlib.suppress(TimeoutError):
            page.wait_for(ADD_BOX, 8)
            break
    page.driver.switch_to.active_element.send_keys(text)


def close_search(page):
    from selenium.webdriver.common.keys import Keys

    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.wait_for(f"!({ADD_BOX})")


@pytest.mark.skipif(browser.missing() is not None, reason=f"no browser: {browser.missing()}")
def test_typing_finds_the_nodes(server, infos):
    """In a page of its own: graphs that other tests opened keep the search from answering."""
    with browser.Page(server.url) as page:
        for text, node in TYPED:
            type_into_search(page, text)
            page.wait_for(f"{RESULTS}.some(text => text.includes(args[0]))", arguments=[infos[node]["display_name"]])
            close_search(page)


def test_every_alias_finds_its_node(shared_page, infos):
    """In the page's own index: the 64 results that the dialog shows at most."""
    aliases = [(alias, name) for name, info in infos.items() for alias in info["search_aliases"]]
    found = shared_page.js(INDEX, sorted({alias for alias, _ in aliases}))
    assert [(alias, name) for alias, name in aliases if name not in found[alias]] == []
    assert all(len(info["search_aliases"]) >= 3 for info in infos.values())


# --- errors: the table and the page ----------------------------------------------------------------------------------


def anchor(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


SECTIONS = [anchor(heading) for heading in re.findall(r"^## (.+)$", TROUBLES, re.M)]
READ_WITHOUT_AN_ERROR = "no-error-but-not-what-i-expected"


def test_every_section_belongs_to_errors_and_every_error_to_a_section():
    assert len(SECTIONS) == len(set(SECTIONS))
    assert set(error_links.SECTIONS) == set(SECTIONS) - {READ_WITHOUT_AN_ERROR}


def test_links_on_the_page_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TROUBLES):
        assert target[1:] in SECTIONS if target.startswith("#") else (ROOT / "docs" / target.split("#")[0]).is_file(), (
            target
        )


PLAIN = ("ValueError", "RuntimeError")
# caught, or shown inside other sentences, or raised in a worker, whose texts rank 0's errors carry
INTERNAL = (
    "flux2/prompts/cache.py",
    "flux2/fused/kernels/",
    "attention/adapter.py",
    *(
        f"flux2/parallel/workers/{name}.py"
        for name in (
            "answers",
            "channel",
            "dtypes",
            "kernel_choice",
            "process_groups",
            "rendezvous",
            "session",
            "worker",
        )
    ),
)


def sentence(node):
    """The text of an expression, with 1 for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(sentence(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return sentence(node.left) + sentence(node.right)
    return "1"


def calls():
    """(place, function name, call) of every call by a plain name in the pack."""
    for folder in ("attention", "flux2", "nodes"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", node.func.id, node


def test_every_sentence_that_is_raised_has_a_section():
    """A sentence (it begins with a capital or with a name that is filled in) is raised as UserError or another class
    that has a topic, never as a plain ValueError; what is a clause of another sentence begins small.
    """
    all_calls = list(calls())
    with_topic = {id(call.args[0]) for _, name, call in all_calls if name == "explained"}
    without = [
        (place, sentence(call.args[0]))
        for place, name, call in all_calls
        if name in PLAIN and call.args and id(call) not in with_topic and not place.startswith(INTERNAL)
    ]
    assert [(place, text) for place, text in without if len(text) > 20 and not text[0].islower()] == []


def test_every_topic_is_a_section():
    given = [
        (place, call.args[1].value)
        for place, name, call in calls()
        if name in ("UserError", "CheckpointError", "explained")
        and len(call.args) > 1
        and isinstance(call.args[1], ast.Constant)
    ]
    assert len(given) > 60 and [(place, topic) for place, topic in given if topic not in SECTIONS] == []
    bare = [place for place, name, call in calls() if name == "UserError" and len(call.args) < 2]
    assert bare == [], "a UserError says where it is explained"


def test_every_class_of_errors_has_a_section(comfy):
    from flux2_pack.attention import errors
    from flux2_pack.nodes import attention, compare, fast, loaders, lora, parallel, prompt, speed  # noqa: F401

    def below(cls):
        return {cls}.union(*map(below, cls.__subclasses__()))

    own = {
        cls
        for cls in below(errors.Explained)
        if cls not in (errors.Explained, errors.UserError) and not isinstance(cls.topic, property)
    }
    assert len(own) >= 5 and {cls.__name__: cls.topic for cls in own if cls.topic not in SECTIONS} == {}


# --- errors: each section is reached by one that really happens -------------------------------------------------------


@pytest.fixture(scope="module")
def tools(comfy, nodes, small_models, tmp_path_factory):
    """What the errors below are made with."""
    from flux2_pack.flux2.loading import load

    folder = tmp_path_factory.mktemp("troubles")
    return SimpleNamespace(
        nodes=nodes, files=small_models, folder=folder, load=load, model=load.load_model(small_models["model"])
    )


def write(tools, name, tensors, metadata=None):
    return maker.write(tools.folder / name, tensors, metadata)


def backend(slug):
    return lambda tools: tools.nodes["Flux2SelectAttention"].execute(tools.model, slug)


def number_format_that_no_kernel_takes(tools):
    """As in a sampling: the model calls the selection, inside the sampler's wrapper."""
    from flux2_pack.attention import dispatch
    from flux2_pack.flux2 import attention_slot

    chosen, q = dispatch.AttentionDispatcher("sdpa-flash"), torch.zeros(1, 8, 2, 16, dtype=torch.float64)
    attention_slot.during_sampling(chosen)(lambda *args: chosen.attend(q, q, q), None, None, None, [1, 0])


def out_of_memory(tools):
    from flux2_pack.attention import dispatch
    from flux2_pack.flux2 import attention_slot

    def sample(*args):
        return torch.empty(2**50)

    attention_slot.during_sampling(dispatch.AttentionDispatcher("sdpa"))(sample, None, None, None, [1, 0])


def encoder_without_the_argument(tools):
    from flux2_pack.flux2.loading import encoder_attention

    with error_links.links():
        encoder_attention.install(SimpleNamespace(cond_stage_model=torch.nn.Linear(1, 1)), None)


def encoder_without_tokenizer(tools):
    weights = {name: value for name, value in maker.text_encoder().items() if name != "tekken_model"}
    weights["vision_tower.x.weight"] = torch.zeros(1)  # says that it is Mistral
    with error_links.links():
        tools.load.load_text_encoder(write(tools, "bare.safetensors", weights))


def prompt_of_another_encoder(tools):
    import comfy.sample

    positive = [[torch.zeros(1, 8, 7680), {}]]
    comfy.sample.sample(
        tools.model, torch.zeros(1, 128, 4, 4), 1, 1.0, "euler", "simple", positive, positive, torch.zeros(1, 128, 4, 4)
    )


def improve_with_the_small_file(tools):
    clip = tools.load.load_text_encoder(tools.files["text_encoder"])
    tools.nodes["Flux2UpsamplePrompt"].execute(clip, "a cat", 0, 0.0, 8)


def in_links(work):
    def wrapped(tools):
        with error_links.links():
            work(tools)

    return wrapped


def quantised_by_bitsandbytes(tools):
    weights = {**maker.diffusion_model(), "img_in.weight.absmax": torch.zeros(1)}
    tools.load.load_model(write(tools, "bnb.safetensors", weights))


def unknown_to_comfyui(tools):
    import comfy.sd

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda *args: None)
        tools.load.load_model(tools.files["model"])


def truncated_file(tools):
    path = tools.folder / "short.safetensors"
    path.write_bytes(tools.files["vae"].read_bytes()[:100_000])
    tools.load.load_vae(path)


def benchmark_of_no_size(tools):
    tools.nodes["Flux2BenchmarkAttention"].execute(tools.model, "large")


def too_many_references(tools):
    from flux2_pack.flux2.upsampling.vision_inputs import frames as pictures

    pictures([torch.zeros(5, 32, 32, 3)], 4)


def fast_blocks_on_a_cpu(tools):
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("TRITON_INTERPRET", raising=False)
        tools.nodes["Flux2FastBlocks"].execute(tools.model, "checkpoint")


def compiling_another_model(tools):
    from flux2_pack.flux2.compiled import blocks as compiled_blocks

    other = SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1))
    compiled_blocks.install(SimpleNamespace(model=other), compiled_blocks.CompilePlan())


def lora_of_another_model(tools):
    from flux2_pack.flux2.lora import load

    name = "lora_unet_single_blocks_0_modulation_lin"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 256), f"{name}.lora_up.weight": torch.zeros(768, 4)}
    load.apply(tools.model, None, write(tools, "flux1-lora.safetensors", tensors), 1.0)


def more_gpus_than_there_are(tools):
    from flux2_pack.nodes.parallel import parallel

    parallel(tools.model, gpus=64)


HAPPENS = {
    "backend-unavailable": backend("flash3"),
    "aiter-on-rocm": backend("aiter"),
    "quantised-backends": backend("sage2"),
    "unknown-backend": backend("sageattn"),
    "refused-call": number_format_that_no_kernel_takes,
    "out-of-memory": out_of_memory,
    "first-and-last-steps-and-blocks": lambda tools: tools.nodes["Flux2SelectAttention"].execute(
        tools.model, "sdpa", edge_backend="sdpa"
    ),
    "linked-values": lambda tools: tools.nodes["Flux2SelectAttention"].execute(model=None, backend="sdpa"),
    "attention-of-the-text-encoder": encoder_without_the_argument,
    "tokenizer": encoder_without_tokenizer,
    "prompt-of-another-text-encoder": prompt_of_another_encoder,
    "improving-prompts": improve_with_the_small_file,
    "lora": in_links(lora_of_another_model),
    "wrong-kind-of-file": in_links(lambda tools: tools.load.load_model(tools.files["vae"])),
    "missing-file": lambda tools: tools.nodes["Flux2LoadVAE"].execute("no-such-file.safetensors", "auto"),
    "quantised-file": in_links(quantised_by_bitsandbytes),
    "update-comfyui": in_links(unknown_to_comfyui),
    "damaged-file": in_links(truncated_file),
    "prompts": lambda tools: tools.nodes["Flux2EncodePrompts"].execute(None, ""),
    "reference-images": in_links(too_many_references),
    "compare-and-benchmark": benchmark_of_no_size,
    "fast-blocks": fast_blocks_on_a_cpu,
    "compiling": in_links(compiling_another_model),
    "several-gpus": in_links(more_gpus_than_there_are),
}


def test_every_section_is_tried():
    assert set(HAPPENS) == set(SECTIONS) - {READ_WITHOUT_AN_ERROR}


@pytest.mark.parametrize("section", HAPPENS)
def test_an_error_leads_to_its_section(tools, section):
    with pytest.raises(Exception) as caught:
        HAPPENS[section](tools)
    lines = str(caught.value).split("\n")
    assert lines[-1] == f"More: {error_links.address(section)}", lines
    assert sum(line.startswith("More: ") for line in lines) == 1, lines


# --- errors: what happens to them -------------------------------------------------------------------------------------


def test_an_error_keeps_its_type_and_its_first_lines():
    error = error_links.link(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert type(error) is torch.OutOfMemoryError and str(error).startswith(
        "CUDA out of memory. Tried to allocate 2 GiB.\nMore: "
    )
    once = str(error)
    assert str(error_links.link(error)) == once, "the address is added once"
    assert error_links.bare(once) == "CUDA out of memory. Tried to allocate 2 GiB."


def test_an_error_is_called_after_the_pack_and_not_after_its_folder():
    """ComfyUI shows module and class of an error in front of its text."""
    with pytest.raises(CheckpointError) as caught, error_links.links():
        raise CheckpointError("There is no such file.")
    assert f"{caught.type.__module__}.{caught.type.__name__}" == "flux2_attention.CheckpointError"


def test_the_page_takes_the_names_of_all_classes_of_errors_off_their_texts():
    ends = re.search(r"\(\?:(Error\|[\w|]+)\)", (ROOT / "web" / "reasons.js").read_text())[1]
    code = "".join(
        file.read_text() for folder in ("attention", "flux2", "nodes") for file in (ROOT / folder).rglob("*.py")
    )
    names = re.findall(r"^class (\w+)\(.*\b(?:Explained|UserError)\b", code, re.M)
    assert "NotFound" in names and [name for name in names if not re.search(rf"(?:{ends})$", name)] == []


@pytest.mark.parametrize(
    "error",
    [ValueError("something else"), ValueError(), KeyError("out of memory"), OSError(2, "No such file"), ValueError(3)],
)
def test_errors_of_others_are_left_alone(error):
    before = str(error)
    assert error_links.link(error) is error and str(error) == before


def test_the_address_is_that_of_the_published_repository(tmp_path, monkeypatch):
    def address(text):
        (tmp_path / "pyproject.toml").write_text(text)
        monkeypatch.setattr(error_links, "ROOT", tmp_path)
        error_links.repository.cache_clear()
        return error_links.address("prompts")

    try:
        assert (
            address('[project.urls]\nRepository = "https://github.com/a/b.git"\n')
            == "https://github.com/a/b/blob/main/docs/troubleshooting.md#prompts"
        )
        assert address("[project.urls]\n") == "docs/troubleshooting.md#prompts in the folder of this pack"
    finally:
        error_links.repository.cache_clear()


def test_nodes_stay_what_they_are(nodes):
    from flux2_pack.nodes.attention import Flux2SelectAttention as plain

    linked = nodes["Flux2SelectAttention"]
    assert linked.__name__ == plain.__name__ and linked.__module__ == plain.__module__ and issubclass(linked, plain)
    import inspect

    assert inspect.getfullargspec(linked.validate_inputs).args == inspect.getfullargspec(plain.validate_inputs).args, (
        "ComfyUI reads the arguments"
    )
    from comfy_api.internal import first_real_override

    assert first_real_override(nodes["Flux2AttentionReport"], "validate_inputs") is None


def test_an_async_node_is_linked_too():
    async def work(cls):
        raise UserError("There is no attention backend 'x'.", "unknown-backend")

    with pytest.raises(ValueError, match="More: .*#unknown-backend"):
        asyncio.run(error_links.linking(work)(None))


def test_a_comparison_shows_reasons_without_addresses(tools):
    from flux2_pack.flux2.measuring import compare

    candidate = compare.backend_variant("flash3")
    found = compare.sampling.record(candidate, tools.model, SimpleNamespace(steps=1), None)
    assert "needs an NVIDIA GPU" in found.error and "More:" not in found.error


def test_the_server_says_it(server, model_files):
    """What the user reads: in the answer to a prompt that is refused, and in the error of a node that fails."""

    def prompt(**loader):
        return {
            "1": {
                "class_type": "Flux2LoadModel",
                "inputs": {
                    "model_name": model_files["diffusion_models"][0].name,
                    "weight_dtype": "as stored",
                    **loader,
                },
            },
            "2": {"class_type": "Flux2SelectAttention", "inputs": {"model": ["1", 0], "backend": "flash3"}},
            "3": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "4": {"class_type": "Flux2AttentionReport", "inputs": {"model": ["2", 0], "latent": ["3", 0]}},
        }

    with pytest.raises(Exception, match="More: .*#backend-unavailable"):
        run(server, prompt())
    with pytest.raises(Exception, match="More: .*#missing-file"):
        run(server, prompt(model_name="nowhere.safetensors"))
    with pytest.raises(Exception, match="More: .*#damaged-file"):
        run(server, prompt(model_name=TEXT_FILE))
    deadline = time.monotonic() + 30  # the error is sent before its prompt leaves the queue
    while any(queue := queued(server).values()):
        assert time.monotonic() < deadline, queue


def queued(server):
    with urllib.request.urlopen(f"{server.url}/queue", timeout=30) as answer:
        return json.load(answer)
