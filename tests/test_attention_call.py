"""Calls, limits and hardware as data: every constraint gives its sentence, and all of them at once."""

import pytest
import torch

from flux2_pack.attention.call import AttentionCall, AttentionRefused, Hardware, Limits, call_of
from flux2_pack.attention.device import Device, describe

H200 = Device("nvidia", "sm90", "NVIDIA H200")
MI300X = Device("amd", "gfx942", "AMD Instinct MI300X")


def call(**changes):
    values = dict(
        batch=1, q_len=4608, kv_len=4608, heads=48, kv_heads=48, head_dim=128, dtype=torch.bfloat16, device=H200
    )
    return AttentionCall(**{**values, **changes})


@pytest.mark.parametrize(
    "limits, change, words",
    [
        (Limits(), {"dtype": torch.float32}, "tensors are float32"),
        (Limits(head_dims=(64, 128)), {"head_dim": 96}, "64 or 128"),
        (Limits(head_dim_max=128), {"head_dim": 256}, "up to 128"),
        (Limits(head_dim_multiple=8), {"head_dim": 100}, "divisible by 8"),
        (Limits(), {"mask": "full"}, "no attention mask"),
        (Limits(), {"need_lse": True}, "log-sum-exp"),
        (Limits(grouped_heads=False), {"kv_heads": 8}, "48"),
        (Limits(), {"kv_heads": 7}, "multiple"),
        (Limits(equal_lengths=True), {"kv_len": 512}, "512 keys and 4608 queries"),
        (Limits(min_length=128), {"q_len": 64}, "at least 128"),
        (Limits(length_multiple=128), {"q_len": 4600}, "divisible by 128"),
        (Limits(), {"last_offset": 2**31}, "32-bit"),
    ],
)
def test_each_limit_names_what_it_wants_and_what_it_found(limits, change, words):
    assert limits.reasons(call()) == []
    reasons = limits.reasons(call(**change))
    assert len(reasons) == 1 and words in reasons[0] and reasons[0].endswith((".", ")."))


def test_all_reasons_are_given_not_only_the_first():
    reasons = Limits(head_dims=(64,)).reasons(call(dtype=torch.float32, need_lse=True, last_offset=2**31))
    assert len(reasons) == 4


def test_hidden_keys_are_no_obstacle_for_a_kernel_without_masks():
    assert Limits().reasons(call(mask="keys")) == []


@pytest.mark.parametrize(
    "archs, device, fits",
    [
        ({"nvidia": ("sm9x",)}, H200, True),
        ({"nvidia": ("sm10x",)}, H200, False),
        ({"nvidia": ()}, H200, True),
        ({"nvidia": ()}, MI300X, False),
        ({"amd": ("gfx942", "gfx950")}, MI300X, True),
        ({"amd": ("gfx11xx",)}, Device("amd", "gfx1100", "RX 7900"), True),
        ({"amd": ("gfx11xx",)}, MI300X, False),
        ({"nvidia": ("sm12x",)}, Device("nvidia", "sm120", "RTX 5090"), True),
    ],
)
def test_hardware_rows(archs, device, fits):
    reasons = Hardware(archs).reasons(device)
    assert (reasons == []) == fits
    assert fits or device.arch in reasons[0]


def test_a_call_is_read_off_the_tensors():
    base = torch.zeros(2, 40, 3 * 4 * 16)
    q, k, v = (t.unflatten(-1, (4, 16)) for t in base.chunk(3, dim=-1))
    found = call_of(q, k, v)
    assert (found.batch, found.q_len, found.kv_len, found.heads, found.kv_heads, found.head_dim) == (
        2,
        40,
        40,
        4,
        4,
        16,
    )
    assert found.last_offset == 39 * 192 + 1 * 40 * 192 + 63 and found.unit_stride
    assert found.device.platform == "cpu" and str(found).startswith("batch 2, length 40, 4 heads of 16, float32")


def test_rocm_is_not_taken_for_nvidia(monkeypatch):
    from flux2_pack.attention import device as module

    properties = type(
        "P", (), {"gcnArchName": "gfx942:sramecc+:xnack-", "name": "AMD Instinct MI300X", "major": 9, "minor": 4}
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    module._accelerator.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert describe("cuda:0") == MI300X
    module._accelerator.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    assert describe("cuda:0").platform == "nvidia" and describe("cuda:0").arch == "sm94"
    module._accelerator.cache_clear()


def test_a_refusal_is_text_made_from_its_fields():
    error = AttentionRefused("flash4", ["It needs an NVIDIA GPU.", "It is not installed."], "pip install it", call())
    assert error.backend == "flash4" and len(error.reasons) == 2
    text = str(error)
    assert (
        "flash4" in text
        and "- It needs an NVIDIA GPU." in text
        and "- It is not installed." in text
        and "pip install it" in text
        and "4608" in text
    )
