"""Locales: every text of every node in seven languages, none left over, nothing broken on the way, and ComfyUI's page
shows them.

  bash scripts/test.sh tests/test_locales.py

What a translation says is not judged; that it keeps the numbers, the values of combos and the backends of the English
text is.
"""

from collections import Counter
import copy
import json
import re
import urllib.request

import pytest
import torch

import browser
import make_locales
from make_locales import ENGLISH, FOLDER, LANGUAGES, NODES, OTHERS, flat, read

VUE_SYNTAX = re.compile(r"[@{}|]|%\{")  # the page would take these for placeholders, links and plurals
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def info(server):
    """ComfyUI's /object_info."""
    with urllib.request.urlopen(f"{server.url}/object_info", timeout=60) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def texts():
    """{language: {key: text}} of nodeDefs.json."""
    return {language: flat(read(FOLDER / language / NODES)) for language in (ENGLISH, *LANGUAGES)}


# --- completeness ----------------------------------------------------------------------------------------------------


def test_nothing_is_missing_stale_or_outdated(info):
    problems = make_locales.update(info, write=False)
    assert not problems, json.dumps(problems, indent=1, ensure_ascii=False)


def test_every_node_input_and_output_has_a_name_and_a_tooltip(info, texts):
    pack = {
        name: entry
        for name, entry in info.items()
        if entry["python_module"] == info["Flux2SelectAttention"]["python_module"]
    }
    assert len(pack) >= 11 and set(read(FOLDER / ENGLISH / NODES)) == set(pack)
    for name, entry in pack.items():
        inputs = [input_name for kind in ("required", "optional") for input_name in entry["input"].get(kind, {})]
        wanted = {
            f"{name}.display_name",
            f"{name}.description",
            *(f"{name}.inputs.{i}.{part}" for i in inputs for part in ("name", "tooltip")),
            *(f"{name}.outputs.{number}.tooltip" for number in range(len(entry["output"]))),
        }
        for language, known in texts.items():
            assert wanted <= set(known), (language, wanted - set(known))
            assert all(known[key].strip() for key in wanted), language


def test_translations_are_translations(texts):
    """Long texts differ from English, and between languages."""
    for language in LANGUAGES:
        same = [key for key, text in texts[language].items() if len(text) > 30 and text == texts[ENGLISH][key]]
        assert same == [], language
    for key, text in texts[ENGLISH].items():
        if key.endswith("description"):
            assert len({texts[language][key] for language in LANGUAGES}) == len(LANGUAGES), key


SCRIPTS = {"zh": "\u4e00-\u9fff", "ja": "\u3040-\u30ff", "ko": "\uac00-\ud7af", "ru": "\u0400-\u04ff"}


@pytest.mark.parametrize("language", SCRIPTS)
def test_tooltips_are_written_in_the_languages_script(texts, language):
    tooltips = {key: text for key, text in texts[language].items() if key.endswith(("tooltip", "description"))}
    assert [key for key, text in tooltips.items() if not re.search(f"[{SCRIPTS[language]}]", text)] == []


# --- nothing is broken on the way ------------------------------------------------------------------------------------


def test_no_text_has_what_the_page_takes_for_syntax():
    for language in (ENGLISH, *LANGUAGES):
        for name in (NODES, *OTHERS):
            broken = [key for key, text in flat(read(FOLDER / language / name)).items() if VUE_SYNTAX.search(text)]
            assert broken == [], (language, name)


def options(info):
    """Every value of every combo of this pack."""
    pack = make_locales.english(info)
    return {
        value
        for name in pack
        for kind in ("required", "optional")
        for spec in info[name]["input"].get(kind, {}).values()
        if spec[0] == "COMBO"
        for value in spec[1]["options"]
    }


def test_values_of_combos_stay_as_they_are_stored(info, texts):
    """They are part of saved workflows: a translated tooltip names them as English does."""
    values = options(info)
    assert {"as stored", "CPU when idle", "each line", "nearest away"} <= values
    for key, text in texts[ENGLISH].items():
        named = {value for value in re.findall(r"'([^']+)'", text) if value in values}
        for language in LANGUAGES:
            assert all(f"'{value}'" in texts[language][key] for value in named), (language, key)


def test_numbers_and_backends_survive_translation(info, texts):
    pattern = make_locales.runs(make_locales.slugs(info))
    for key, text in texts[ENGLISH].items():
        for language in LANGUAGES if not key.endswith(".name") else ():
            there, wanted = NUMBER.findall(texts[language][key]), NUMBER.findall(text)
            assert all(there.count(number) >= wanted.count(number) for number in set(wanted)), (language, key)
            assert pattern.findall(texts[language][key]) == pattern.findall(text), (language, key)


def test_line_breaks_stay(texts):
    for key, text in texts[ENGLISH].items():
        assert {texts[language][key].count("\n") for language in LANGUAGES} == {text.count("\n")}, key


def test_files_are_those_that_comfyui_reads():
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == {ENGLISH, *LANGUAGES}
    for language in (ENGLISH, *LANGUAGES):
        assert {path.name for path in (FOLDER / language).iterdir()} <= {NODES, *OTHERS}


# --- reports: the server says them in English, the page in its language (web/texts.js) --------------------------------


@pytest.fixture(scope="module")
def sentences():
    """{language: {English sentence with $1, $2 for what varies: the same in the language}}."""
    return {code: read(FOLDER / code / "main.json")["flux2Attention"]["reports"] for code in (ENGLISH, *LANGUAGES)}


def test_sentences_of_reports_keep_what_varies(sentences):
    for language in LANGUAGES:
        for english, text in sentences[language].items():
            assert sorted(re.findall(r"\$\d", text)) == sorted(re.findall(r"\$\d", english)), (language, english)
    assert all(english == text for english, text in sentences[ENGLISH].items())
    for english in sentences[ENGLISH]:
        numbers = re.findall(r"\$(\d)", english)
        assert numbers == sorted(numbers), "the page counts what varies from the left"


# parts of these depend on a number or on which of two is faster: the pack does not say them in one piece
IN_PIECES = {
    "$1, $2 s per step, $3 less than the reference ($4 s)",
    "$1, $2 s per step, $3 more than the reference ($4 s)",
    "$1, $2 less than ComfyUI's own ($3)",
    "Miss: encoded in $1 s and kept on disk ($2 MiB).",
    "Miss: encoded in $1 s together with $2 more and kept on disk ($3 MiB).",
    "$1 s/step (1 step)",
    "an NVIDIA GPU or an AMD GPU",
    "an NVIDIA GPU or an AMD GPU or a CPU",
    *(CALL := ("batch $1, length $2, $3 heads of $4, $5", "$1 queries x $2 keys", "key-padding mask")),
    (AUTO := "auto on $1, batch $2, length $3, $4 heads of $5, $6: $7 ($8)"),
}


def test_every_sentence_is_one_that_the_pack_says(sentences):
    """A sentence that was changed in the code would stay English on the page, without an error."""
    files = [path for part in ("attention", "flux2", "nodes") for path in (make_locales.ROOT / part).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a text that goes on in the next line
    assert set(sentences[ENGLISH]) >= IN_PIECES
    for english in set(sentences[ENGLISH]) - IN_PIECES:
        parts = [part.strip() for part in re.split(r"\$\d|[,;:.()]", english)]
        assert [part for part in parts if len(part) > 3 and part not in code] == [], english


def test_a_call_and_the_choice_of_auto_are_told_as_their_sentences_say():
    from flux2_pack.attention.autotune import AutoChoice

    call = masked_call()
    for sentence, text in [
        (CALL[0], str(call)),
        (CALL[1], re.search("length (.+?),", str(call))[1]),
        (CALL[2], str(call).split(", ")[-1]),
        (AUTO, AutoChoice(str(call), "cuda:0", "sdpa", "measured", []).as_text()),
    ]:
        assert re.fullmatch(re.sub(r"\\\$\d", "(.+)", re.escape(sentence)), text), (sentence, text)


def masked_call():
    from flux2_pack.attention.call import call_of

    return call_of(torch.empty(1, 24, 4, 16), *2 * [torch.empty(1, 48, 4, 16)], mask_kind="keys")


def said_by_the_pack(model_files):
    """{what: a report as the pack makes it}."""
    from flux2_pack.attention.autotune import AutoChoice, TimedBackend
    from flux2_pack.attention.measuring.results import Benchmark, BenchmarkRow, Comparison, ComparisonRow
    from flux2_pack.attention.measuring.statistics import Timing
    from flux2_pack.attention.run_log import Entry, Run
    from flux2_pack.attention.status import backends_here
    from flux2_pack.flux2.loading.examine import describe_path
    from test_measure import CONTROL, evidence, judge, statistics

    machine = statistics.machine("cpu")
    run = Run("auto", steps=20, seconds=3.6, loading_seconds=0.1)
    run.entries["one"] = Entry("sdpa", "PyTorch", "flash", str(masked_call()), "sdpa was chosen", calls=120)
    fastest = "fastest of 2 exact backends, measured on this call"
    unfit = "It takes head sizes up to 256, and this model has 512."
    rows = [TimedBackend("sdpa", 0.443, 1e-3), TimedBackend("aiter", reason=unfit)]
    run.tables.append(AutoChoice(str(masked_call()), "cuda:0", "sdpa", fastest, rows))
    row = ComparisonRow("sdpa-math", seen := evidence(1e-6), judge(seen, CONTROL), 60.1, 0.9999, 0.4)
    gone = ComparisonRow("flash4", reason="It needs an NVIDIA GPU, and this model runs on a CPU (x86_64).")
    reference = ComparisonRow("comfyui", seconds_per_step=0.5)
    rows = [
        BenchmarkRow("512x512", name, "step", Timing(ms, ms, ms, 3)) for name, ms in (("sdpa", 443), ("comfyui", 610))
    ]
    missing = {"aiter": ["It needs an AMD GPU, and this model runs on a CPU (x86_64)."]}
    (reason,) = backends_here.entry("aiter", backends_here.describe("cpu"))["reasons"]
    return {
        "attention": run.as_text(),
        "comparison": Comparison(reference, [row, gone], None, "", machine, {"steps": 3}).as_text(),
        "benchmark": Benchmark(rows, missing, machine, {"sizes": "512x512"}).as_text(),
        "model": describe_path(model_files["diffusion_models"][0]),
        "reason": reason,
        "badge": "auto \u2192 sdpa \u00b7 0.18 s/step (20 steps)",
    }


SHOWN = """
const {rendered} = await import('/extensions/flux2-attention/report.js');
const cells = row => [...row.cells].map(cell => cell.textContent).join('  ');
return rendered(args[0]).flatMap(made => made.rows ? [...made.rows].map(cells) : [made.textContent.trim()]);
"""


def test_reports_are_shown_in_the_language_of_the_page(comfy, shared_page, model_files):
    """The first line, which is the answer, the headings and the verdicts; figures and backends stay as they are."""
    reports, english = said_by_the_pack(model_files), {}
    try:
        for language in (ENGLISH, *LANGUAGES):
            shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', args[0])", language)
            shown = {name: shared_page.js(SHOWN, text) for name, text in reports.items()}
            english = english or shown
            if language == ENGLISH:
                assert {n: "".join(lines).replace(" ", "") for n, lines in shown.items()} == {
                    name: text.replace("\n", "").replace(" ", "") for name, text in reports.items()
                }
                continue
            for name, lines in shown.items():
                assert lines[0] != english[name][0], (language, name)
                for before, after in zip(english[name], lines, strict=True):
                    lost = Counter(NUMBER.findall(before)) - Counter(NUMBER.findall(after))
                    assert not lost, (language, before, after)
            everything = "\n".join(line for lines in shown.values() for line in lines)
            assert all(slug in everything for slug in ("sdpa-math", "flash4", "aiter"))
            for gone in (
                "per step",
                "Cannot run here",
                "same image",
                "did not run",
                "It needs",
                "Compared",
                "Known by",
                "was chosen",
                "fastest of",
                "queries x",
                "padding mask",
                "fastest:",
                "not timed",
                "It takes",
                "relative error",
            ):
                assert gone not in everything, (language, gone)
    finally:
        shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', 'en')")


def test_a_report_is_translated_on_its_node_and_copied_as_the_server_said_it(shared_page):
    from flux2_pack.attention.run_log import Run

    text = Run("auto").as_text()
    try:
        shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', 'zh')")
        shown, kept = shared_page.js(
            """
            const node = LiteGraph.createNode('Flux2AttentionReport');
            node.onExecuted({text: [args[0]]});
            const {element, value} = node.widgets.find(({name}) => name === 'report');
            return [element.textContent, value];""",
            text,
        )
        assert "还没有看到注意力调用" in shown and "No attention call" not in shown
        assert kept == text
    finally:
        shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', 'en')")


# --- what a backend is: one line in the dialog with the backends of this machine --------------------------------------

NAME = re.compile(r"[\w-]*[A-Z\d][\w-]*")  # of a format, a library or a card: with a capital or a digit
WORD = re.compile(r"\b[a-z]{3,}\b")


def test_every_backend_says_what_it_is_in_every_language():
    from flux2_pack.attention.registry import ROWS

    summaries, problems = {row.summary: slug for slug, row in ROWS.items()}, []
    for language in (ENGLISH, *LANGUAGES):
        known = read(FOLDER / language / "main.json")["flux2Attention"]["backends"]
        where = f"locales/{language}/main.json, flux2Attention.backends"
        for summary, slug in summaries.items():
            if not known.get(summary, "").strip():
                problems.append(f"{where}: no text for what {slug} is. Add one under the key {summary!r}.")
            elif language == ENGLISH and known[summary] != summary:
                problems.append(f"{where}: the English text of {slug} is not its row's summary, {summary!r}.")
            elif language != ENGLISH and WORD.search(summary) and known[summary] == summary:
                problems.append(f"{where}: the text of {slug} is still English: {summary!r}.")
            elif lost := [name for name in NAME.findall(summary) if name not in known[summary]]:
                problems.append(f"{where}: the text of {slug} lacks {', '.join(lost)}: {known[summary]!r}.")
        problems += [f"{where}: no backend is {key!r} any more." for key in known if key not in summaries]
    assert not problems, "\n".join(problems)


def test_the_dialog_says_what_a_backend_is_in_the_language_of_the_page(shared_page):
    summary = "PyTorch's own choice of kernel"
    try:
        for language in (ENGLISH, "zh"):
            ours = read(FOLDER / language / "main.json")["flux2Attention"]
            shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', args[0])", language)
            shared_page.js("await app.extensionManager.command.execute('Flux2Attention.ShowBackends')")
            shared_page.wait_for("document.querySelectorAll('.flux2-dialog tr').length > 3")
            lines = shared_page.js(
                "return [...document.querySelectorAll('.flux2-dialog small')].map(line => line.textContent)"
            )
            assert f"{ours['backends'][summary]}; {ours['exact']}; {ours['any device']}" in lines, language
            shared_page.js("document.querySelector('.flux2-dialog').close()")
            shared_page.wait_for("!document.querySelector('.flux2-dialog')")
    finally:
        shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', 'en')")


# --- what the templates say ------------------------------------------------------------------------------------------


def texts_of(template):
    """Titles and paragraphs of a template's notes, and titles of its groups: what ComfyUI does not translate."""
    graphs = [template, *template.get("definitions", {}).get("subgraphs", [])]
    found = [group["title"] for graph in graphs for group in graph.get("groups", [])]
    for node in template["nodes"]:
        if node["type"] == "MarkdownNote":
            found += [node["title"], *node["widgets_values"][0].split("\n\n")]
    return {text.strip() for text in found if text.strip() and not text.startswith("- models/")}


TEMPLATES = sorted((make_locales.ROOT / "example_workflows").glob("*.json"))


def test_every_text_of_a_template_has_a_translation():
    wanted = set().union(*(texts_of(read(file)) for file in TEMPLATES))
    for language in (ENGLISH, *LANGUAGES):
        notes = read(FOLDER / language / "main.json")["flux2Attention"]["notes"]
        assert set(notes) == wanted, language
        same = [text for text, said in notes.items() if len(text) > 20 and said == text]
        assert bool(same) == (language == ENGLISH), language


def test_a_template_opens_in_the_language_of_the_page(shared_page):
    template, own = read(TEMPLATES[0]), "A note that somebody wrote."
    template["nodes"].append({**next(n for n in template["nodes"] if n["type"] == "MarkdownNote"), "id": 977})
    template["nodes"][-1] |= {"title": own, "widgets_values": [own]}
    notes = read(FOLDER / "ja" / "main.json")["flux2Attention"]["notes"]
    try:
        shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', 'ja')")
        shared_page.load(template, "template")
        said, titles, groups = shared_page.js("""
            const found = app.graph.nodes.filter(({type}) => type === 'MarkdownNote');
            const graphs = [app.graph, ...app.graph.subgraphs.values()];
            return [found.map(node => node.widgets[0].value), found.map(({title}) => title),
              graphs.flatMap(({groups}) => groups.map(({title}) => title))];""")
    finally:
        shared_page.js("await app.extensionManager.setting.set('Comfy.Locale', 'en')")
    assert titles == [notes["FLUX.2 with the attention kernel you choose"], own] and said[1] == own
    assert said[0].startswith(notes["**Model files** and their folders:"] + "\n\n- models/diffusion_models: [flux2_dev")
    assert notes["**Compare:** the seed is fixed, so change only *attention kernel* and run again."] in said[0]
    assert set(groups) == {notes[title] for title in ("Models", "Attention", "Prompt", "Sampling")}


# --- the script ------------------------------------------------------------------------------------------------------


def small_info(tooltip="Fast: sdpa, aiter.", backends=("sdpa", "aiter")):
    """One node as in /object_info."""
    return {
        "Flux2SelectAttention": {
            "display_name": "Select",
            "description": "Chooses.",
            "python_module": "custom_nodes.this",
            "output": ["MODEL", "STRING"],
            "output_name": ["MODEL", "report"],
            "output_tooltips": ["The model.", "The report."],
            "input": {"required": {"backend": ["COMBO", {"options": list(backends), "tooltip": tooltip}]}},
        },
        "KSampler": {"python_module": "nodes"},
    }


def small_tree():
    return {
        "Flux2SelectAttention": {
            "display_name": "Wahl",
            "description": "Waehlt.",
            "inputs": {"backend": {"name": "Kern", "tooltip": "Schnell: sdpa, aiter."}},
            "outputs": {"0": {"tooltip": "Das Modell."}, "1": {"name": "Bericht", "tooltip": "Der Bericht."}},
        }
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one finished language."""
    monkeypatch.setattr(make_locales, "LANGUAGES", ("zh",))
    make_locales.save(tmp_path / "zh" / NODES, small_tree())
    assert make_locales.update(small_info(), tmp_path) == {}
    return tmp_path


def test_an_unchanged_folder_is_left_as_it_is(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    assert (
        make_locales.update(small_info(), folder) == {}
        and {path: path.read_bytes() for path in folder.rglob("*.json")} == before
    )


def test_an_output_named_like_its_type_is_left_to_comfyui(folder):
    assert read(folder / "en" / NODES)["Flux2SelectAttention"]["outputs"]["0"] == {"tooltip": "The model."}


def test_a_new_backend_reaches_every_language_by_itself(folder):
    changed = small_info("Fast: sdpa, flash4, aiter.", ("sdpa", "flash4", "aiter"))
    assert make_locales.update(changed, folder, write=False) != {}, "and the check sees it before"
    assert make_locales.update(changed, folder) == {}
    assert (
        read(folder / "zh" / NODES)["Flux2SelectAttention"]["inputs"]["backend"]["tooltip"]
        == "Schnell: sdpa, flash4, aiter."
    )


def test_a_changed_english_text_is_reported_until_its_translation_changes(folder):
    changed = small_info("Faster than ever: sdpa, aiter.")
    for _ in range(2):
        assert make_locales.update(changed, folder) == {
            "zh": ["outdated: Flux2SelectAttention.inputs.backend.tooltip: Faster than ever: sdpa, aiter."]
        }
    edited = small_tree()
    edited["Flux2SelectAttention"]["inputs"]["backend"]["tooltip"] = "Schneller denn je: sdpa, aiter."
    make_locales.save(folder / "zh" / NODES, edited)
    assert make_locales.update(changed, folder) == {}


def test_an_outdated_text_can_be_accepted(folder):
    changed = small_info("Fast. sdpa, aiter.")
    assert make_locales.update(changed, folder, accept=["zh"]) == {} == make_locales.update(changed, folder)


def test_missing_and_stale_texts_are_reported(folder):
    edited = small_tree()
    edited["Flux2Gone"] = edited["Flux2SelectAttention"].pop("inputs")
    make_locales.save(folder / "zh" / NODES, edited)
    make_locales.save(folder / "en" / "commands.json", {"Show": {"label": "Show"}})
    problems = make_locales.update(small_info(), folder, write=False)["zh"]
    assert {line.split(": ")[0] for line in problems} == {"missing", "stale"} and len(problems) == 5
    assert "missing: commands.json: Show.label" in problems and any("Flux2Gone" in line for line in problems)


def test_the_check_writes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    info = copy.deepcopy(small_info())
    info["Flux2SelectAttention"]["description"] = "Other."
    assert set(make_locales.update(info, folder, write=False)) == {"en", "zh"}
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


# --- in ComfyUI ------------------------------------------------------------------------------------------------------


def test_comfyui_serves_them(server, texts):
    with urllib.request.urlopen(f"{server.url}/i18n", timeout=30) as answer:
        served = json.load(answer)
    for language in (ENGLISH, *LANGUAGES):
        assert {key: served[language]["nodeDefs"][key] for key in read(FOLDER / language / NODES)} == read(
            FOLDER / language / NODES
        )
        assert flat(read(FOLDER / language / "settings.json")).items() <= flat(served[language]["settings"]).items()


OURS = """
const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
return [stores.get('command').commands.map(({id}) => id), Object.keys(stores.get('setting').settingsById)]
  .map(ids => ids.filter(id => /^flux2/i.test(id)).map(id => id.replaceAll('.', '_')));
"""


def test_commands_and_settings_of_the_page_have_texts(shared_page):
    commands, settings = shared_page.js(OURS)
    assert set(commands) == set(read(FOLDER / ENGLISH / "commands.json"))
    assert set(settings) == set(read(FOLDER / ENGLISH / "settings.json"))


def reload(page, language):
    """Open the page anew in a language."""
    browser.store_settings(page.url, {"Comfy.Locale": language})
    page.js("window.beforeReload = true")
    page.driver.refresh()
    page.wait_for(f"!window.beforeReload && {browser.READY}", browser.SECONDS_TO_OPEN)


ADD_NODE = """
app.graph.clear();
const node = LiteGraph.createNode(args[0]);
node.pos = [500, 300];
app.graph.add(node);
await new Promise(requestAnimationFrame);
return {title: node.title, description: node.constructor.nodeData.description, labels: \
Object.fromEntries(node.widgets.map(({name, label}) => [name, label])),
  outputs: node.outputs.map(output => output.localized_name), values: node.serialize().widgets_values, type: \
node.serialize().type,
  inputs: (await app.graphToPrompt()).output[node.id].inputs};
"""


def test_a_page_in_another_language(shared_page, texts):
    """Title, description, names and tooltips are translated; what a workflow saves and the server gets is not."""
    node, seen = "Flux2SelectAttention", {}
    try:
        for language in ("zh", ENGLISH):
            reload(shared_page, language)
            seen[language] = shown = shared_page.js(ADD_NODE, node)
            known = texts[language]
            assert (
                shown["title"] == known[f"{node}.display_name"] and shown["description"] == known[f"{node}.description"]
            )
            names = {name: label for name, label in shown["labels"].items() if f"{node}.inputs.{name}.name" in known}
            assert len(names) >= 8 and names == {name: known[f"{node}.inputs.{name}.name"] for name in names}
            shared_page.fit()
            assert shared_page.tooltip(node, "backend") == known[f"{node}.inputs.backend.tooltip"]
    finally:
        reload(shared_page, ENGLISH)
    for part in ("values", "type", "inputs"):
        assert seen["zh"][part] == seen[ENGLISH][part]
