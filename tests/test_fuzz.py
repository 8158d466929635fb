"""The seeded fuzz of all loaders (500 damaged files; fuzz_files.py by hand for more) and of the inputs of all nodes.

Goal: no raw error, no hang, nothing over three seconds of computing.
"""

import importlib
import inspect
import pkgutil
import random

import pytest

import fuzz_files

FILES, INPUTS = 500, 400
VALUES = (
    None,
    True,
    -1,
    0,
    2**63,
    1.5,
    float("nan"),
    "",
    ".",
    "..",
    "/",
    "\0",
    "x" * 300,
    "a:b",
    "\ud800",
    [],
    {},
    [1],
    ["1", 0],
)


def test_500_damaged_files_give_sentences_or_load(comfy, tmp_path):
    shown = []
    total, slowest = fuzz_files.fuzz(FILES, "ci", tmp_path, shown.append)
    assert set(total) == {"done", "sentence"}, "\n".join(shown)
    assert total["sentence"] > FILES / 2 and total["done"] > FILES / 2


@pytest.fixture(scope="module")
def nodes(comfy):
    from flux2_pack import nodes

    modules = [
        importlib.import_module(f"{nodes.__name__}.{found.name}") for found in pkgutil.iter_modules(nodes.__path__)
    ]
    return {node.define_schema().node_id: node for module in modules for node in getattr(module, "NODES", ())}


def test_no_value_of_an_input_breaks_a_validator(nodes):
    """A validator answers True or with a sentence, whatever an API prompt holds."""
    for number in range(INPUTS):
        rng = random.Random(f"ci/{number}")
        node = nodes[rng.choice(sorted(nodes))]
        arguments = inspect.signature(node.validate_inputs).parameters
        if any(kind.kind is kind.VAR_KEYWORD for kind in arguments.values()):
            continue  # core's own
        texts = {item.id for item in node.define_schema().inputs if item.io_type == "STRING"}
        given = {name: rng.choice(VALUES) for name in arguments}  # ComfyUI makes text of what a STRING is given
        given = {name: str(value) if name in texts and value is not None else value for name, value in given.items()}
        answer = node.validate_inputs(**given)
        assert answer is True or (isinstance(answer, str) and answer), (node, given)


def test_no_value_breaks_a_fingerprint(nodes):
    for name, node in nodes.items():
        function = node.fingerprint_inputs
        if "fingerprint_inputs" not in vars(node) and not any(
            "fingerprint_inputs" in vars(base) for base in node.__mro__[:2]
        ):
            continue
        for value in VALUES:
            if isinstance(value, (str, type(None))):
                function(file=value) if "file" in inspect.signature(function).parameters else None


@pytest.mark.parametrize("name", ["Flux2LoadModel", "Flux2LoadTextEncoder", "Flux2LoadVAE", "Flux2ModelInfo"])
def test_a_loader_that_is_given_any_value_says_a_sentence(nodes, name):
    """What a link brings reaches execute unchecked."""
    from flux2_pack.flux2.checkpoints.header import CheckpointError

    node = nodes[name]
    first, *others = node.define_schema().inputs
    for value in VALUES:
        with pytest.raises(CheckpointError, match="There is no "):  # file, or for Model Info folder
            node.execute(**{first.id: value}, **{item.id: item.default for item in others if not item.optional})
