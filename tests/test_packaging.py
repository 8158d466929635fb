"""What the repository promises to those who publish it, install it and add to it: registry metadata, the published
archive, CONTRIBUTING's steps, CI.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import registry as publication
from pack import ROOT

CHECKOUT = (ROOT / ".git").exists() and shutil.which("git")
CLAIMED = {
    "name": "flux2-attention",
    "version": "0.1.0",
    "license": {"text": "Apache-2.0"},
    "classifiers": ["Operating System :: OS Independent", "Environment :: GPU :: AMD ROCm"],
    "urls": dict.fromkeys(("Repository", "Documentation", "Bug Tracker"), "https://github.com/o/n"),
}
COMFY = {
    "PublisherId": "somebody",
    "DisplayName": "Flux 2 Attention",
    "Icon": "https://raw.githubusercontent.com/o/n/main/docs/icon.png",
    "Banner": "https://raw.githubusercontent.com/o/n/main/docs/banner.png",
    "requires-comfyui": ">=0.30.0",
}


def metadata(project=(), comfy=()):
    return {"project": {**CLAIMED, **dict(project)}, "tool": {"comfy": {**COMFY, **dict(comfy)}}}


def pyproject():
    return publication.tomllib.loads((ROOT / "pyproject.toml").read_text())


# --- registry metadata -----------------------------------------------------------------------------------------------


def test_the_registry_takes_the_metadata():
    assert publication.problems(pyproject()) == []


def test_amd_and_nvidia_and_the_system_are_declared():
    classifiers = pyproject()["project"]["classifiers"]
    assert {
        "Environment :: GPU :: AMD ROCm",
        "Environment :: GPU :: NVIDIA CUDA",
        "Operating System :: OS Independent",
    } <= set(classifiers)


@pytest.mark.parametrize(
    "project, comfy, sentence",
    [
        ({"name": "ComfyUI-flux2"}, {}, "must not include ComfyUI"),
        ({"name": "2-flux"}, {}, "start with a letter"),
        ({"name": "flux--2"}, {}, "single hyphens"),
        ({"version": "0.1"}, {}, "must be X.Y.Z"),
        ({"version": "9.9.9"}, {}, "no section '## 9.9.9'"),
        ({"license": {}}, {}, "The license must be"),
        ({"classifiers": ["Environment :: GPU :: AMD ROCm"]}, {}, "no classifier 'Operating System"),
        (
            {"classifiers": ["Operating System :: OS Independent", "Environment :: GPU :: ROCm"]},
            {},
            "does not know the classifier 'Environment :: GPU :: ROCm'",
        ),
        ({}, {"DisplayName": ""}, "DisplayName"),
        ({}, {"requires-comfyui": ">=0.30.0,<1.0.0"}, "one comparison"),
        ({}, {"PublisherId": ""}, "PublisherId is empty"),
        ({}, {"Icon": "docs/icon.png"}, "Icon must be an address"),
        ({}, {"Banner": ""}, "Banner must be an address"),
        ({"urls": {}}, {}, "no Repository address"),
        ({"urls": {"Repository": "https://github.com/o/n"}}, {}, "no Bug Tracker address"),
    ],
)
def test_what_the_registry_would_not_take_is_said(project, comfy, sentence):
    assert publication.problems(metadata(), publishing=True) == []
    assert any(sentence in found for found in publication.problems(metadata(project, comfy), publishing=True))


def test_publisher_and_addresses_are_filled_in_without_touching_the_rest():
    before = (ROOT / "pyproject.toml").read_text()
    text = publication.filled(before, "somebody", "https://github.com/owner/flux2-attention.git")
    data = publication.tomllib.loads(text)
    assert (
        publication.problems(data, publishing=True) == []
        and data["project"]["urls"]["Bug Tracker"] == "https://github.com/owner/flux2-attention/issues"
    )
    assert all(data["project"]["urls"].values()) and all(data["tool"]["comfy"].values()), "nothing is left empty"
    assert data["tool"]["comfy"]["Icon"] == "https://raw.githubusercontent.com/owner/flux2-attention/main/docs/icon.png"
    assert publication.filled(text, "somebody", "https://github.com/owner/flux2-attention") == text, (
        "filling in twice changes nothing"
    )
    kept = [line for line in before.splitlines() if line not in text.splitlines()]
    assert all(
        line.startswith(("PublisherId", "Icon", "Banner", "Repository", "Documentation", '"Bug Tracker"'))
        for line in kept
    )


@pytest.mark.parametrize(
    "publisher, repository",
    [
        ("somebody", "owner/name"),
        ("somebody", "https://gitlab.com/owner/name"),
        ("not an id", "https://github.com/o/n"),
    ],
)
def test_what_cannot_be_filled_in_is_refused_in_words(publisher, repository):
    with pytest.raises(ValueError, match="must be https|A publisher id"):
        publication.filled((ROOT / "pyproject.toml").read_text(), publisher, repository)


def test_the_icon_is_what_its_script_draws():
    from PIL import Image, ImageChops

    import icon

    with Image.open(icon.FILE) as drawn:
        # another Pillow may round otherwise
        assert max(high for _, high in ImageChops.difference(drawn.convert("RGBA"), icon.draw()).getextrema()) <= 2


def test_the_banner_is_what_its_script_draws():
    from PIL import Image, ImageChops

    import icon

    with Image.open(icon.BANNER) as drawn:
        assert drawn.size == (1344, 576)
        changed = ImageChops.difference(drawn.convert("L"), icon.banner().convert("L")).point(lambda v: 255 * (v > 40))
        assert sum(map(bool, changed.tobytes())) < 0.02 * 1344 * 576  # another Pillow draws letters a little otherwise


def test_licence_notice_and_papers_are_there():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence and len(licence) > 11000
    for name in ("NOTICE", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert len((ROOT / name).read_text()) > 400, name
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        for file in re.findall(
            r"`((?:attention|scripts|tests|benchmarks|nodes|flux2|docs)/[\w./-]+\.\w+)`", (ROOT / name).read_text()
        ):
            assert (ROOT / file).exists() or file.endswith("einsum.py"), f"{name} names {file}"


def test_requirements_are_empty_because_managers_install_them_unasked():
    assert [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
    ] == []
    assert pyproject()["project"]["dependencies"] == []


# --- the published archive -------------------------------------------------------------------------------------------


def listed(*options):
    out = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", *options], capture_output=True, text=True, check=True
    ).stdout
    return {name for name in out.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def archive():
    """Names of the files that would be published: git's, less .comfyignore's. Files that git does not ignore count as
    already added.
    """
    if not CHECKOUT:
        pytest.skip("this is not a git checkout")
    everything = listed("--cached", "--others", "--exclude-standard")
    return everything - listed("--cached", "--others", "--ignored", f"--exclude-from={ROOT / '.comfyignore'}")


def test_the_archive_has_what_users_need_and_not_what_developers_need(archive):
    for folder in ("nodes", "flux2", "attention", "web", "docs", "locales", "subgraphs", "example_workflows"):
        wanted = {
            name for name in listed("--cached", "--others", "--exclude-standard") if name.startswith(f"{folder}/")
        }
        assert {name for name in wanted if not re.fullmatch(r"docs/.*\.png", name)} <= archive, folder
    assert {
        "__init__.py",
        "pyproject.toml",
        "requirements.txt",
        "README.md",
        "LICENSE",
        "NOTICE",
        "scripts/generate.py",
        "scripts/demo.sh",
    } <= archive
    assert not any(name.startswith((".github/", ".ci/", "benchmarks/small/")) for name in archive)
    assert not any(re.match(r"tests/(test_|conftest)", name) for name in archive)
    assert not any(name.startswith(("tests/data/small_flux2/", "docs/small-model.png")) for name in archive)


def test_the_archive_is_small(archive, tmp_path):
    """As `comfy node pack` zips it. The drawing model of the demo, 29 MB, comes with a checkout."""
    with zipfile.ZipFile(tmp_path / "node.zip", "w", zipfile.ZIP_DEFLATED) as made:
        for name in archive:
            made.write(ROOT / name, name)
    assert (tmp_path / "node.zip").stat().st_size < 3 * 10**6


def imported(text):
    """Top-level names that a Python file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(text)))
    return {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names} | {
        node.module.split(".")[0]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


def test_scripts_in_the_archive_find_what_they_import(archive):
    """A script that imports a module of scripts/, benchmarks/ or tests/ is published with it, or not at all."""
    homes = {}
    for name in listed("--cached", "--others", "--exclude-standard"):
        if re.fullmatch(r"(scripts|benchmarks|tests)/\w+\.py", name):
            homes.setdefault(name.split("/")[1][:-3], []).append(name)
    for name in sorted(archive):
        if re.fullmatch(r"(scripts|benchmarks|tests)/\w+\.py", name):
            for module in imported((ROOT / name).read_text()) & set(homes):
                assert set(homes[module]) & archive, (
                    f"{name} imports {module}, which .comfyignore leaves out: leave {name} out too, or keep both"
                )


LOAD = """
import asyncio, json, os, sys
sys.path.insert(0, os.environ["COMFYUI_PATH"])
import comfy.options
comfy.options.enable_args_parsing(False)
from comfy.cli_args import args
args.cpu = True
import nodes
print(json.dumps([asyncio.run(nodes.load_custom_node(sys.argv[1])), sorted(name for name in nodes.NODE_CLASS_MAPPINGS \
if name.startswith("Flux2"))]))
"""


def test_the_archive_loads_in_comfyui(archive, tmp_path, comfyui):
    pack = tmp_path / "unpacked here"
    for name in archive:
        if not name.endswith(".safetensors"):
            (pack / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, pack / name)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(pack)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    loaded, found = json.loads(done.stdout.splitlines()[-1])
    snapshot = json.loads((ROOT / "tests" / "data" / "object_info.json").read_text())
    assert loaded and set(snapshot) <= set(found)


def test_a_clone_under_another_name_loads_too(tmp_path, comfyui):
    """ComfyUI-Manager clones into a folder of the repository's name, whatever that is."""
    if not CHECKOUT:
        pytest.skip("this is not a git checkout")
    pack = tmp_path / "ComfyUI-Flux_2.Attention-main"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(pack)], check=True, timeout=300)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(pack)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "COMFYUI_PATH": str(comfyui), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    loaded, found = json.loads(done.stdout.splitlines()[-1])
    assert loaded and len(found) >= 15


# --- CONTRIBUTING: a backend in one file -----------------------------------------------------------------------------

FOLLOW = """
import json, sys, types
import torch
module = types.ModuleType("pack")
module.__path__ = [sys.argv[1]]
sys.modules["pack"] = module
from pack.attention import reference, registry
from pack.attention.status import backends_here
from pack.attention.dispatch import AttentionDispatcher
q, k, v = (torch.randn(2, n, h, 64) for n, h in ((40, 4), (33, 2), (33, 2)))
dispatcher = AttentionDispatcher("einsum")
out, lse = dispatcher.attend(q, k, v, need_lse=True)
wanted, wanted_lse = reference.attend(q, k, v)
row = next(row for row in backends_here.list_backends(torch.device("cpu"))["backends"] if row["backend"] == "einsum")
print(json.dumps({"error": reference.relative_error(out, wanted), "lse": (lse - wanted_lse).abs().max().item(), \
"offered": "einsum" in registry.SLUGS,
                  "probe": registry.probe("einsum", torch.device("cpu"), torch.float32, 128), "state": row["state"], \
"ran": dispatcher.log.current.as_text(),
                  "hardware": backends_here.hardware_text(registry.row("einsum").hardware), "library": row["library"], \
"summary": row["summary"]}))
"""


def blocks(text, heading):
    """{bold title: the code block below it} of a section."""
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return {title: code for title, code in re.findall(r"\*\*\d\. (.+?)\*\*.*?```\w*\n(.*?)```", section, re.S)}


def test_a_backend_added_by_the_steps_of_contributing_works(tmp_path):
    steps = blocks((ROOT / "CONTRIBUTING.md").read_text(), "Add a backend in one file")
    shutil.copytree(ROOT / "attention", tmp_path / "attention", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "attention" / "backends" / "einsum.py").write_text(steps["The file"])
    registry = tmp_path / "attention" / "registry.py"
    before = registry.read_text()
    registry.write_text(before.replace("\nROWS = {\n", "\nROWS = {\n" + steps["The row"], 1))
    assert registry.read_text() != before
    done = subprocess.run([sys.executable, "-c", FOLLOW, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (
        found["error"] < 1e-6
        and found["lse"] < 1e-5
        and found["offered"]
        and found["probe"] == []
        and found["state"] == "runs here"
        and "einsum" in found["ran"]
    )
    assert (
        steps["The line"]
        == f"| `einsum` | {found['library']}: {found['summary']} | {found['hardware']} | nothing | exact |\n"
    )


def test_the_example_backend_is_among_what_the_tests_of_all_backends_run(tmp_path):
    """Step 4: the tests named there, run on a copy of the pack with the example in it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    steps, named = (
        blocks(text, "Add a backend in one file"),
        re.findall(r"bash scripts/test\.sh (tests/\S+) tests/test_readme.py", text),
    )
    shutil.copytree(ROOT / "attention", tmp_path / "attention", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "attention" / "backends" / "einsum.py").write_text(steps["The file"])
    registry = tmp_path / "attention" / "registry.py"
    registry.write_text(registry.read_text().replace("\nROWS = {\n", "\nROWS = {\n" + steps["The row"], 1))
    (tmp_path / "tests").mkdir()
    for name in ("pack.py", "devices.py", "pytest.ini", *(file.removeprefix("tests/") for file in named)):
        shutil.copyfile(ROOT / "tests" / name, tmp_path / "tests" / name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pack", "-p", "no:cacheprovider", "-q", "-k", "einsum", *named],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "tests")},
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 8, done.stdout + done.stderr


# --- GitHub Actions --------------------------------------------------------------------------------------------------


def workflows():
    import yaml

    return {
        file.stem: yaml.safe_load(file.read_text()) for file in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    }


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_tests_run_on_every_python_and_on_the_oldest_and_newest_comfyui():
    import environment

    matrix = workflows()["tests"]["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"] and matrix["comfyui"] == [
        f"v{environment.COMFYUI_VERSION}",
        "newest",
    ]
    assert (
        pyproject()["project"]["requires-python"] == ">=3.10"
        and pyproject()["tool"]["comfy"]["requires-comfyui"] == f">={environment.COMFYUI_VERSION}"
    )
    assert any(step.get("run") == "bash scripts/test.sh" for step in steps_of(workflows()["tests"]))


def test_workflows_name_files_that_exist_and_ask_for_no_more_than_they_need():
    assert {"tests", "compatibility", "rocm", "publish"} <= set(workflows())
    for name, workflow in workflows().items():
        for step in steps_of(workflow):
            for file in re.findall(r"(?:scripts|benchmarks)/\w+\.\w+", step.get("run", "")):
                assert (ROOT / file).is_file(), f"{name}: {file}"
        assert workflow["permissions"]["contents"] == "read" and all(
            job["timeout-minutes"] for job in workflow["jobs"].values()
        )
    assert set(workflows()["rocm"][True]) == {"workflow_dispatch"}, "only by hand"  # YAML reads the key `on` as True


def test_the_publish_step_hands_over_the_changelog(tmp_path):
    script = next(
        step["run"] for step in steps_of(workflows()["publish"]) if "COMFY_NODE_CHANGELOG" in step.get("run", "")
    )
    (tmp_path / "python").symlink_to(sys.executable)
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GITHUB_ENV": str(tmp_path / "env")},
    )
    first, *middle, last = (tmp_path / "env").read_text().splitlines()
    assert done.returncode == 0 and first == "COMFY_NODE_CHANGELOG<<END_OF_CHANGELOG" and last == "END_OF_CHANGELOG"
    assert "\n".join(middle) == publication.changelog(pyproject()["project"]["version"]) != ""
