"""The README and docs/backends.md say what the code has: every backend, node and folder."""

import asyncio
import re

from flux2_pack.attention import registry

from pack import ROOT

README = (ROOT / "README.md").read_text()
BACKENDS = (ROOT / "docs" / "backends.md").read_text()


def test_every_backend_is_in_the_table_with_its_kind():
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \|.*\| (exact|quantised) \|$", BACKENDS, re.M))
    assert rows == {
        "auto": "exact",
        **{slug: "exact" if row.exact else "quantised" for slug, row in registry.ROWS.items()},
    }


def test_every_node_is_in_the_table(comfy):
    from flux2_pack import nodes

    extension = asyncio.run(nodes.comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    assert {n.define_schema().node_id for n in listed} == set(re.findall(r"\(`(Flux2\w+)`\)", README))
    assert all(n.define_schema().display_name in README for n in listed)


def test_every_file_it_names_exists():
    for name in set(
        re.findall(r"`((?:scripts|benchmarks|attention|docs|example_workflows|tests)/[\w./-]*[\w/])`", README)
    ) | set(re.findall(r"\((docs/[\w.-]+)\)", README)):
        assert (ROOT / name).exists(), name
