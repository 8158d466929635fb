"""Saved workflows rely on node ids, inputs, their order, types, defaults and outputs: they are those of the snapshot,
or were appended and noted there.
"""

import copy

import pytest

import object_info


@pytest.fixture(scope="module")
def found(server):
    return object_info.fetch(server.url)


def test_nothing_that_saved_workflows_rely_on_has_changed(found):
    broken = object_info.broken(object_info.snapshot(), found)
    assert not broken, "\n".join([*broken, object_info.HOW_TO_UPDATE])


def test_what_was_added_is_in_the_snapshot(found):
    added = object_info.added(object_info.snapshot(), found)
    assert not added, "\n".join([*added, "Note it in the snapshot: python scripts/object_info.py --update"])


def test_the_snapshot_has_every_node_of_the_pack(found):
    assert len(found) >= 11 and all(name.startswith("Flux2") for name in found)


# --- the comparison itself

OLD = {
    "Flux2X": {
        "inputs": [
            {"name": "model", "kind": "required", "type": "MODEL"},
            {"name": "mode", "kind": "optional", "type": "COMBO", "default": "a", "options": ["a", "b"]},
            {"name": "steps", "kind": "optional", "type": "INT", "default": 4, "min": 0, "max": 100},
        ],
        "outputs": [["MODEL", False]],
        "output_node": False,
    }
}
EXTRA = {"name": "more", "kind": "optional", "type": "INT", "default": 0}


def changed(change):
    new = copy.deepcopy(OLD)
    change(new["Flux2X"])
    return new


def swap(node):
    node["inputs"][1:] = node["inputs"][:0:-1]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda node: node["inputs"].pop(1), "may only be appended"),
        (swap, "may only be appended"),
        (lambda node: node["inputs"].insert(1, EXTRA), "may only be appended"),
        (lambda node: node["inputs"][1].update(name="Mode"), "may only be appended"),
        (
            lambda node: node["inputs"][1].update(type="STRING"),
            "the type of its input mode was 'COMBO' and is 'STRING'",
        ),
        (lambda node: node["inputs"][1].update(default="b"), "the default of its input mode was 'a' and is 'b'"),
        (lambda node: node["inputs"][1].update(kind="required"), "was optional and is required"),
        (lambda node: node["inputs"][1].update(options=["a", "c"]), "no longer has the options 'b'"),
        (lambda node: node["inputs"][2].update(max=10), "the range of its input steps was 0 to 100 and is 0 to 10"),
        (lambda node: node["inputs"][2].update(min=1), "the range of its input steps was 0 to 100 and is 1 to 100"),
        (lambda node: node["inputs"].append({**EXTRA, "kind": "required"}), "the new input more is required"),
        (lambda node: node["outputs"].insert(0, ["STRING", False]), "outputs may only be appended"),
        (lambda node: node.update(output_node=True), "output node"),
    ],
)
def test_a_change_that_breaks_saved_workflows_is_said(change, sentence):
    assert any(sentence in found for found in object_info.broken(OLD, changed(change)))


def test_a_node_that_is_gone_is_said():
    assert object_info.broken(OLD, {}) == ["The node Flux2X is gone."]


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node["inputs"].append(EXTRA),
        lambda node: node["outputs"].append(["STRING", False]),
        lambda node: node["inputs"][1]["options"].insert(0, "c"),
        lambda node: node["inputs"][2].update(max=1000),
        lambda node: node["inputs"][0].update(kind="optional"),
    ],
)
def test_what_is_appended_or_wider_breaks_nothing_and_is_new(change):
    new = changed(change)
    assert object_info.broken(OLD, new) == [] and len(object_info.added(OLD, new)) == 1


def test_files_of_a_machine_are_no_part_of_it():
    info = {
        "input": {
            "required": {
                "file": ["COMBO", {"options": ["model.safetensors", "none"], "default": "model.safetensors"}],
                "old": [["a", "b"], {}],
            }
        },
        "input_order": {"required": ["file", "old"]},
        "output": ["MODEL"],
        "output_is_list": [False],
        "output_node": False,
    }
    assert object_info.contract(info)["inputs"] == [
        {"name": "file", "kind": "required", "type": "COMBO", "options": ["none"]},
        {"name": "old", "kind": "required", "type": "COMBO", "options": ["a", "b"]},
    ]


def test_the_file_reads_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(object_info, "FILE", tmp_path / "info.json")
    assert object_info.snapshot() == {}
    object_info.write(OLD)
    assert object_info.snapshot() == OLD and len(object_info.FILE.read_text().splitlines()) == 7
