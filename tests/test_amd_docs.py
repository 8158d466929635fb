"""docs/amd.md says of every backend that AMD hardware can run what was proven, and the registry calls experimental what
never ran."""

import re

from flux2_pack.attention import registry
from flux2_pack.attention.device import Device
from flux2_pack.attention.status import backends_here

from pack import ROOT

PAGE = (ROOT / "docs" / "amd.md").read_text()


def proofs():
    """{slug: (architectures, proven by)} of the page's table."""
    table = PAGE.split("| backend | architectures | proven by | not proven |")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {slug: (row[1], row[2]) for row in rows for slug in re.findall(r"`([a-z0-9-]+)`", row[0])}


def test_the_page_has_every_backend_of_amd_with_its_architectures():
    ours = {slug: row.hardware.archs["amd"] for slug, row in registry.ROWS.items() if "amd" in row.hardware.archs}
    assert set(proofs()) == set(ours)
    for slug, archs in ours.items():
        named = set(re.findall(r"gfx\w+", proofs()[slug][0]))
        assert all(arch in named or re.fullmatch(r"gfx1[12]xx", arch) for arch in archs), slug
        assert all(registry.row(slug).hardware.reasons(Device("amd", a, "")) == [] for a in named if "x" not in a[3:])


def test_what_never_ran_on_its_hardware_is_experimental_and_the_page_agrees():
    assert {slug for slug in registry.ROWS if not registry.experimental(slug)} == {
        *("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flash4", "sage1")
    }
    amd, nvidia = Device("amd", "gfx942", "AMD Instinct MI300X"), Device("nvidia", "sm90", "NVIDIA H200")
    for slug, (_, proof) in proofs().items():
        assert registry.experimental(slug, amd), f"{slug}: no run on AMD is recorded in benchmarks/results"
        assert registry.experimental(slug, nvidia) == ("on an H200" not in proof), slug
    assert registry.experimental("sdpa-cudnn", Device("cpu", "x86_64", "CPU"))


def test_every_claim_of_a_proof_names_a_kind_that_the_page_explains():
    kinds = set(re.findall(r"^- \*\*([\w -]+)\*\*:", PAGE, re.M))
    assert kinds == {"signatures", "stand-in", "interpreter", "on NVIDIA", "compiled", "run"}
    for slug, (_, proof) in proofs().items():
        assert any(kind in proof for kind in kinds), slug


def test_the_list_of_backends_carries_the_word():
    cpu = registry.describe("cpu")
    rows = {slug: backends_here.entry(slug, cpu) for slug in ("sdpa", "aiter", "flash4")}
    assert {slug: row["experimental"] for slug, row in rows.items()} == {"sdpa": False, "aiter": True, "flash4": False}
    found = {"machine": {}, "backends": list(rows.values())}
    lines = {line.split()[0]: line for line in backends_here.as_text(found).splitlines() if line}
    assert "experimental; " in lines["aiter"] and "experimental" not in lines["sdpa"]


def test_files_and_anchors_of_the_page_exist():
    for name in set(re.findall(r"`((?:scripts|benchmarks|tests|docs)/[\w./-]+)`", PAGE)):
        assert (ROOT / name).exists(), name
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^## (.+)$", PAGE, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings
