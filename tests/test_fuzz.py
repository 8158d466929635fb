"""The seeded fuzz of all loaders (500 damaged files; fuzz_files.py by hand for more) and of all nodes: their
validators, and 500 runs with hostile values (fuzz_nodes.py by hand for more).

Goal: no raw error, no hang, nothing over three seconds of computing.
"""

import copy
import importlib
import inspect
import pkgutil
import random

import pytest

import fuzz_files
import fuzz_nodes

FILES, INPUTS, RUNS = 500, 400, 500
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


# --- whole nodes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folders_restored(comfy):
    """fuzz_nodes gives ComfyUI folders of its own."""
    import folder_paths

    names = ("input_directory", "output_directory", "temp_directory", "user_directory")
    before = {name: getattr(folder_paths, name) for name in names}
    paths = copy.deepcopy(folder_paths.folder_names_and_paths)
    yield
    for name, value in before.items():
        setattr(folder_paths, name, value)
    folder_paths.folder_names_and_paths.update(paths)
    folder_paths.filename_list_cache.clear()


def test_500_runs_of_nodes_with_hostile_values_end_in_results_or_sentences(folders_restored, tmp_path):
    shown = []
    total, slowest = fuzz_nodes.fuzz(RUNS, "ci", tmp_path, shown.append)
    assert set(total) == {"done", "sentence"}, "\n".join(shown)
    assert total["sentence"] > RUNS / 3 and total["done"] > RUNS / 5


@pytest.fixture(scope="module")
def linked(comfy):
    return fuzz_nodes.nodes_of_the_pack()


def test_every_input_of_every_node_is_checked(linked):
    from flux2_pack.flux2 import node_inputs

    kinds = {item.io_type for node in linked.values() for item in node.define_schema().inputs}
    assert kinds <= {*node_inputs.SOCKETS, *node_inputs.CONSTANTS}


@pytest.mark.parametrize(
    "values, words",
    [
        ({"steps": None}, 'Warm Up: the input "steps" takes a whole number from 1 to 100. It was given None.'),
        ({"steps": 101}, "It was given 101."),
        ({"steps": 1.5}, "It was given 1.5."),
        ({"steps": 10**5000}, "It was given a number with thousands of digits."),
        ({"sizes": 3}, 'the input "sizes" takes a text. It was given 3.'),
        ({"model": "flux"}, "takes a MODEL of a loader node. It was given 'flux'."),
        ({"vae": []}, "takes a VAE of a loader node. It was given a value of type list."),
        ({"positive": []}, "takes a CONDITIONING: at least one encoded prompt"),
    ],
)
def test_what_a_link_brings_is_refused_with_what_the_input_takes(linked, values, words):
    with pytest.raises(ValueError) as caught:
        linked["Flux2WarmUp"].execute(**{"sizes": "32x32", **values})
    assert words in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "sizes, words",
    [
        ("a" * 10**6, f"'{'a' * 37}...' is not a size."),
        ("9" * 5000 + "x16", "...' is not a size."),
        ("32x32," * 100, "100 sizes are too many: name at most 64."),
    ],
)
def test_a_text_of_sizes_is_bounded(comfy, sizes, words):
    from flux2_pack.flux2.measuring import capture

    with pytest.raises(ValueError) as caught:
        capture.sizes(sizes)
    assert words in str(caught.value) and len(str(caught.value)) < 600


def test_whole_numbers_of_other_types_are_taken(linked):
    import numpy
    import torch
    from flux2_pack.flux2 import node_inputs

    node = linked["Flux2WarmUp"]
    for value in (3, 3.0, numpy.int64(3), torch.tensor(3)):
        found = node_inputs.fitted(node, "steps", value)
        assert found == 3 and type(found) is int
    assert node_inputs.fitted(linked["Flux2LoadLoRA"], "strength", 1) == 1.0


def test_tensors_are_looked_at_before_they_are_used(comfy):
    import torch
    from flux2_pack.flux2 import node_inputs

    good = torch.tensor([1.0, 0.5, 0.0])
    assert node_inputs.is_sigmas(good) and node_inputs.is_sigmas(good[:0]), (
        "Compare says what a schedule without steps is"
    )
    for wrong in (good.to_sparse(), good.to("meta"), good.int(), good[None], good * float("nan"), [1.0, 0.0], None):
        assert not node_inputs.is_sigmas(wrong)
    latent = torch.zeros(1, 128, 2, 2)
    for extra in ({}, {"batch_index": [0, 3]}, {"noise_mask": torch.ones(1, 2, 2)}, {"batch_index": None}):
        assert node_inputs.is_latent({"samples": latent, **extra})
    for extra in ({"batch_index": [10**9]}, {"batch_index": 3}, {"batch_index": ["x"]}, {"noise_mask": "x"}):
        assert not node_inputs.is_latent({"samples": latent, **extra})
    assert not node_inputs.is_image(torch.zeros(1, 0, 4, 3)) and node_inputs.is_image(torch.zeros(2, 4, 4, 3))


def test_an_error_of_a_model_becomes_a_sentence_and_keeps_its_cause(comfy):
    from flux2_pack.attention.errors import UserError
    from flux2_pack.flux2.measuring import sampling

    with pytest.raises(UserError, match="Sampling stopped with this error.*KeyError: 'x'") as caught:
        with sampling.in_words("Sampling"):
            raise KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(MemoryError):
        with sampling.in_words("Sampling"):
            raise MemoryError
