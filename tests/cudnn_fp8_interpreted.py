"""The cudnn-fp8 adapter on a CPU: its kernels in Triton's interpreter, cuDNN's part by cudnn_fake. Run by
test_cudnn_fp8.py in a process of its own.

What this shows is the adapter: layouts, scales, means, rotation, log-sum-exp. The tensors are float32, since the
interpreter has no bfloat16, and its rounding to fp8 is replaced by PyTorch's: it loses the carry where the next power
of two is reached (31.2 becomes 16). cuDNN's own kernel is measured on a GPU by benchmarks/attention.py and
benchmarks/accuracy.py.
"""

import contextlib
import os
import sys

import numpy
import pytest
import torch
from triton.runtime import interpreter

import cudnn_fake
import pack  # noqa: F401
from flux2_pack.attention import reference
from flux2_pack.attention.device import Device

LOSS = 0.075  # cuDNN's on gaussian data on an H200 is 0.058

plain_convert = interpreter._convert_float


def convert_float(values, source, target, rounding):
    """The interpreter's conversion between number formats, with PyTorch's rounding to e4m3."""
    if str(target) != "fp8e4nv" or values.dtype != numpy.float32:
        return plain_convert(values, source, target, rounding)
    return torch.from_numpy(values.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


@pytest.fixture
def backend(monkeypatch):
    assert os.environ.get("TRITON_INTERPRET") == "1"
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setitem(sys.modules, "cudnn", cudnn_fake.module())
    sys.modules.pop("flux2_pack.attention.backends.cudnn_fp8", None)
    from flux2_pack.attention.backends import cudnn_fp8

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cudnn_fp8, "handle_of", lambda device: None)
    return cudnn_fp8


def tensors(q_len=100, kv_len=100, heads=2, size=64, batch=2, seed=0, views=True):
    """BSHD tensors; as views of (B, H, S, D) memory they have the strides that ComfyUI's have."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, heads, length, size) if views else (batch, length, heads, size) for length in (q_len, kv_len, kv_len)
    ]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.transpose(1, 2) if views else t for t in made]


def with_outliers(q, k, v):
    """Four channels six times as large, and keys and values that are far from 0 on average."""
    generator = torch.Generator().manual_seed(9)
    strong = torch.ones(q.shape[-1])
    strong[torch.randperm(len(strong), generator=generator)[:4]] = 6.0
    mean = torch.randn(1, 1, 1, q.shape[-1], generator=generator)
    return q * strong, k * strong + 4 * mean, v + 3 * mean


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("q_len, kv_len, views", [(100, 100, True), (64, 130, False), (5, 1100, True), (1, 1, True)])
def test_error_and_log_sum_exp(backend, q_len, kv_len, views, size):
    q, k, v = tensors(q_len, kv_len, size=size, views=views)
    expected, lse = reference.attend(q, k, v)
    out, found = backend.ADAPTERS["cudnn-fp8"].attend(q, k, v, need_lse=True)
    assert out.dtype == q.dtype and out.shape == q.shape and found.shape == lse.shape
    assert reference.relative_error(out, expected) < LOSS
    assert (found - lse).abs().max() < 0.15
    alone, none = backend.ADAPTERS["cudnn-fp8"].attend(q, k, v)
    assert none is None and torch.equal(alone, out), "nothing depends on an earlier call"


def plain_fp8(t):
    """t rounded to e4m3 with one scale for the tensor, by PyTorch."""
    scale = t.abs().max() / 448
    return (t / scale).to(torch.float8_e4m3fn).float() * scale


def test_means_and_rotation_pay_where_there_are_outliers(backend, monkeypatch):
    q, k, v = with_outliers(*tensors(size=128))
    expected, _ = reference.attend(q, k, v)

    def error():
        return reference.relative_error(backend.ADAPTERS["cudnn-fp8"].attend(q, k, v)[0], expected)

    whole = error()
    monkeypatch.setattr(backend, "rotation", lambda size, dtype, device: torch.eye(size))
    unturned = error()
    plain = reference.relative_error(reference.attend(*map(plain_fp8, (q, k, v)))[0], expected)
    assert whole < 0.8 * unturned and whole < 0.6 * plain


@pytest.mark.parametrize("length", [90, 1500])
def test_what_is_written_in_fp8(backend, length):
    """Values all seen; of 1500 keys, 16 samples of 64."""
    q, k, v = tensors(70, length, size=64)
    k = k + 5
    q8, k8, v8, scales, means = backend.quantise(q, k, v)
    turn = backend.rotation(64, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(turn @ turn.T, torch.eye(64))
    k_mean, v_mean = means.view(2, 2, 2, 64).unbind(2)
    torch.testing.assert_close(v_mean, v.mean(1), atol=1e-5, rtol=1e-5)
    assert (k_mean - k.mean(1)).abs().max() < (1e-4 if length == 90 else 0.3)
    for stored, scale, exact in (
        (q8, scales[0], q @ turn),
        (k8, scales[1], (k - k_mean[:, None]) @ turn),
        (v8, scales[2], v - v_mean[:, None]),
    ):
        assert stored.is_contiguous() and reference.relative_error(stored.float() * scale, exact) < 0.03
        assert stored.float().abs().max() <= 448
    assert torch.allclose(scales[3], 1 / scales[2])


def test_rows_that_no_sample_saw(backend):
    """Ten times as long as any that was seen: still exact to fp8. Values 1000 times as large: always seen."""
    q, k, v = tensors(1500, 1500, size=64, batch=1)
    tiles = -(-1500 // backend.TOKENS)
    seen = {part * tiles // backend.PARTS for part in range(backend.PARTS)}
    token = next(t for t in range(tiles) if t not in seen) * backend.TOKENS + 3
    v[:, token] *= 1000
    k[:, token] *= 10
    q8, k8, v8, scales, _ = backend.quantise(q, k, v)
    assert max(t.float().abs().max().item() for t in (k8, v8)) < 448, "nothing was cut"
    out, expected = backend.ADAPTERS["cudnn-fp8"].attend(q, k, v)[0], reference.attend(q, k, v)[0]
    assert reference.relative_error(out, expected) < LOSS


def test_zeros_and_a_large_tensor_stay_finite(backend):
    adapter = backend.ADAPTERS["cudnn-fp8"]
    zeros = torch.zeros(1, 8, 1, 64)
    assert torch.equal(adapter.attend(zeros, zeros, zeros)[0], zeros)
    q, k, v = (t * 1e4 for t in tensors(20, 20))
    out, expected = adapter.attend(q, k, v, scale=1e-9)[0], reference.attend(q, k, v, scale=1e-9)[0]
    assert reference.relative_error(out, expected) < LOSS


def test_16_bit_output_where_cudnn_has_it(backend, monkeypatch):
    """Data center Blackwell: no rounding of the output to fp8."""
    q, k, v = tensors()
    expected, _ = reference.attend(q, k, v)
    narrow = reference.relative_error(backend.ADAPTERS["cudnn-fp8"].attend(q, k, v)[0], expected)
    monkeypatch.setattr(backend, "describe", lambda device: Device("nvidia", "sm100", "a B200"))
    assert backend.output_dtype(torch.device("cpu"), torch.bfloat16) == torch.bfloat16
    q, k, v = (t.half() for t in (q, k, v))
    wide = reference.relative_error(backend.ADAPTERS["cudnn-fp8"].attend(q, k, v)[0], expected)
    assert wide < narrow


def test_one_graph_for_each_shape(backend):
    made, plain = [], backend.Graph
    backend.Graph = lambda *a: made.append(a[1:]) or plain(*a)
    try:
        for seed in (0, 1):
            backend.ADAPTERS["cudnn-fp8"].attend(*tensors(33, 44, seed=seed))
        backend.ADAPTERS["cudnn-fp8"].attend(*tensors(33, 45))
        backend.ADAPTERS["cudnn-fp8"].attend(*tensors(33, 45), need_lse=True)
    finally:
        backend.Graph = plain
    assert len(made) == 3
