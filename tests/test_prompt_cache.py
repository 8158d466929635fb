"""The folder of encoded prompts and the words in a prompt, without ComfyUI: what is kept, what is believed, what goes,
and two processes at once.
"""

import os
from pathlib import Path
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import pack  # noqa: F401
from flux2_pack.flux2.prompts import text as prompt_text
from flux2_pack.flux2.prompts.cache import PromptCache, digest_of, name_of, packed

KEY = {"prompt": "a cat", "limit": 512}


@pytest.fixture
def cache(tmp_path):
    return PromptCache(tmp_path / "prompts", 10 * 2**20)


def conditioning(seed=0, tokens=9):
    cond = torch.randn(1, tokens, 192, generator=torch.Generator().manual_seed(seed))
    return [[cond, {"pooled_output": None, "attention_mask": torch.ones(1, tokens, dtype=torch.long)}]]


def same(first, second):
    (a, b), (c, d) = first[0], second[0]
    return (
        torch.equal(a, c)
        and b.keys() == d.keys()
        and torch.equal(b["attention_mask"], d["attention_mask"])
        and b["pooled_output"] is d["pooled_output"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_is_read_bit_for_bit(cache, dtype):
    kept = conditioning()
    kept[0][0] = kept[0][0].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous
    size = cache.write(KEY, kept, ["a note"])
    found, notes = cache.read(KEY)
    assert same(found, kept) and found[0][0].dtype == dtype and notes == ["a note"] and cache.size() == (1, size)


def test_every_part_of_a_key_counts(cache):
    cache.write(KEY, conditioning())
    assert (
        cache.read({**KEY, "prompt": "a cat "}) is None
        and cache.read({**KEY, "limit": None}) is None
        and cache.read({**KEY}) is not None
    )


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGE = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"not a tensor file " * 9,
    "one bit": flip,
    "no header": lambda data: data[8:],
    "another entry": lambda data: packed(name_of("other"), conditioning(), []),
    "one bit of a name": lambda data: data.replace(b"pooled_output", b"pooled_nutput"),
    "foreign metadata": lambda data: packed(name_of(KEY), conditioning(), []).replace(b'"format":"1"', b'"format":"2"'),
    "conditioning of whole numbers": lambda data: packed(
        name_of(KEY), [[torch.ones(1, 2, 3, dtype=torch.int32), {}]], []
    ),
    "conditioning without sides": lambda data: packed(name_of(KEY), [[torch.ones(()), {}]], []),
    "conditioning that is no number": lambda data: packed(name_of(KEY), [[torch.full((1, 2, 3), torch.nan), {}]], []),
    "notes that are no text": lambda data: packed(name_of(KEY), conditioning(), [3]),
    "a list in place of a table": lambda data: with_texts("[]", "[]"),
    "deep nesting": lambda data: with_texts("[" * 100_000, "[]"),
    "pickle": lambda data: b"\x80\x04." * 9,
    "huge header": lambda data: b"\xff" * 8 + data[8:],
}


def with_texts(plain, notes):
    """An entry with a right digest and other texts than this pack writes."""
    tensors = {"cond": conditioning()[0][0]}
    texts = {"plain": plain, "notes": notes}
    metadata = {"format": "1", "key": name_of(KEY), "digest": digest_of(tensors, plain, notes), **texts}
    return safetensors.torch.save(tensors, metadata)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_entry_is_a_miss_and_is_rewritten(cache, damage):
    kept = conditioning()
    cache.write(KEY, kept)
    path = cache.path(KEY)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert cache.read(KEY) is None
    cache.write(KEY, kept)
    assert same(cache.read(KEY)[0], kept)


def test_a_folder_in_the_place_of_an_entry_is_an_error_that_leaves_nothing(cache):
    cache.path(KEY).mkdir(parents=True)
    assert cache.read(KEY) is None
    with pytest.raises(OSError):
        cache.write(KEY, conditioning())
    assert list(cache.folder.iterdir()) == [cache.path(KEY)]


def test_clearing_counts_what_it_removed(cache, monkeypatch, tmp_path):
    cache.write(KEY, conditioning())
    monkeypatch.setattr("flux2_pack.flux2.prompts.cache._remove", lambda path: False)  # a folder that is read-only
    assert cache.clear() == (0, 0) and cache.size()[0] == 1
    (tmp_path / "file").write_text("in the place of the folder")
    assert PromptCache(tmp_path / "file", 1).clear() == (0, 0)


def test_the_least_recently_used_go_first(tmp_path):
    one = len(packed(name_of("0"), conditioning(), []))
    cache = PromptCache(tmp_path, int(3.5 * one))
    for number in range(3):
        cache.write(str(number), conditioning(number))
        os.utime(cache.path(str(number)), (1000 + number, 1000 + number))
    assert cache.read("0") is not None  # used now
    cache.write("3", conditioning(3))
    assert [cache.read(str(number)) is not None for number in range(4)] == [True, False, True, True]
    assert cache.size()[1] <= cache.limit


def test_an_entry_larger_than_the_limit_is_refused_in_words(tmp_path):
    cache = PromptCache(tmp_path, 1000)
    with pytest.raises(ValueError, match="takes 0.0 MiB and the cache may hold 0.0 MiB"):
        cache.write(KEY, conditioning())
    assert cache.size() == (0, 0)


def test_clearing_and_trimming_leave_foreign_files_alone(cache):
    cache.write(KEY, conditioning())
    foreign = [cache.folder / "notes.txt", cache.folder / "model.safetensors", cache.folder / "0123.safetensors"]
    abandoned = cache.folder / f"{'a' * 64}.{'b' * 32}.part"
    for file in [*foreign, abandoned]:
        file.write_text("mine")
    cache.trim()
    assert abandoned.exists(), "another process may be writing it"
    os.utime(abandoned, (1, 1))
    assert cache.clear()[0] == 1 and cache.size() == (0, 0)
    cache.trim()
    assert all(file.read_text() == "mine" for file in foreign) and not abandoned.exists()
    assert PromptCache(cache.folder / "absent", 1).clear() == (0, 0)


def test_hooks_and_schedules_are_not_kept(cache):
    cond, extra = conditioning()[0]
    with pytest.raises(ValueError, match="it carries hooks, which cannot be kept"):
        cache.write(KEY, [[cond, {**extra, "hooks": object()}]])
    with pytest.raises(ValueError, match="2 parts"):
        cache.write(KEY, [[cond, extra], [cond, extra]])


HAMMER = """
import sys; sys.path.insert(0, sys.argv[1]); import pack, torch; torch.set_num_threads(1)
from flux2_pack.flux2.prompts.cache import PromptCache
cache = PromptCache(sys.argv[2], 60_000)
for turn in range(150):
    number = (turn * 7 + int(sys.argv[3])) % 12
    found = cache.read(number)
    if found: assert (found[0][0][0] == number).all() and found[1] == [str(number)]
    else: cache.write(number, [[torch.full((1, 9, 192), float(number)), {"pooled_output": None}]], [str(number)])
print("done")
"""


def test_two_processes_share_a_folder(tmp_path):
    """Both read, write and push out the same entries; whoever reads sees a whole entry or none."""
    tests = str(Path(__file__).parent)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HAMMER, tests, str(tmp_path), str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and out == "done\n", errors[-2000:]
    assert PromptCache(tmp_path, 1).size()[1] <= 60_000 and not list(tmp_path.glob("*.part"))


# --- words in a prompt
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "The prompt is empty"),
        (" \n", "The prompt is empty"),
        ("a (red:1.2) cat", "no prompt weights: '(red:1.2)'"),
        ("a (very red cat : 0.5), b", "no prompt weights"),
        ("embedding:style a cat", "without embeddings: 'embedding:style'"),
        ("a cat, embedding:style:1.1", "without embeddings"),
        ("my embedding: none", "without embeddings: 'embedding: none'"),
        ("a cat <lora:hat:0.8>", "loads no LoRA: '<lora:hat:0.8>'"),
    ],
)
def test_what_flux2_does_not_support_is_said(text, said):
    kept, notes = prompt_text.clean(text)
    assert kept == text and len(notes) == 1 and said in notes[0]


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "at 12:30 (noon)",
        "ratio (16:9 frame)",
        'fields: {"a": 1}',
        "my_embedding:none",
        "\U0001f408\u200d\U0001f3a9 tabs\t\nlines",
    ],
)
def test_ordinary_prompts_get_no_remark(text):
    assert prompt_text.clean(text) == (text, [])


def test_control_characters_are_removed_and_counted():
    text, notes = prompt_text.clean("a\x00 c\x1bat\x7f \ud800.")
    assert text == "a cat ." and "4 control characters removed" in notes[0]


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="must be text; this is list"):
        prompt_text.clean(["a"])


def test_prompts_are_lines_or_paragraphs():
    text = "one\r\ntwo\n\n  \nthree\n"
    assert prompt_text.split(text, "each line") == ["one", "two", "three"] and prompt_text.split(
        text, "blank lines"
    ) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    "data, said",
    [(b"\xff\xfe\x00", "not UTF-8 text .byte 0"), (None, "cannot be read: No such file"), (b"x" * 200, "larger than")],
)
def test_a_bad_prompt_file_is_said(tmp_path, data, said):
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        prompt_text.read_file(path, limit=100)


def test_a_prompt_file_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein Kätzchen".encode())
    assert prompt_text.read_file(path) == "ein Kätzchen"
