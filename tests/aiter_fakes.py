"""A stand-in for the `aiter` package: the recorded signatures of a version, over functions that compute with torch on
the
CPU and keep what they were called with. A call that the real version would answer with a TypeError is a TypeError here
too.
"""

import enum
import importlib
import inspect
import json
import math
from pathlib import Path
import sys
import types

import torch

import pack  # noqa: F401
from flux2_pack.attention import reference, registry
from flux2_pack.attention.adapter import per_tensor_fp8

TABLE = json.loads((Path(__file__).parent / "data" / "aiter_signatures.json").read_text())
KINDS = inspect.Parameter


def version(commit):
    """The functions recorded at a commit (its first digits)."""
    return next(v for v in TABLE["versions"] if v["commit"].startswith(commit))["functions"]


def newest():
    """Every function as it was recorded last: the whole of e404860, and what was read of later commits."""
    later = ("e404860", "0055212", "1013b75", "0540e3f", "01d3e6d", "07cee98")
    return list({(f["file"], f["name"]): f for commit in later for f in version(commit)}.values())


MAIN = newest()


def signature_of(parameters):
    kind, made = KINDS.POSITIONAL_OR_KEYWORD, []
    for name, need in parameters:
        if need == "marker":
            kind = KINDS.KEYWORD_ONLY
        else:
            made.append(KINDS(name, kind, default=KINDS.empty if need == "required" else None))
    return inspect.Signature(made)


class Fake:
    """A function of AITER: its recorded signature, `compute` behind it, and the arguments of each call in `calls`."""

    def __init__(self, name, parameters, compute):
        self.__name__, self.__signature__, self.compute, self.calls = name, signature_of(parameters), compute, []

    def __call__(self, *args, **kwargs):
        given = self.__signature__.bind(*args, **kwargs).arguments
        self.calls.append(given)
        return self.compute(given)


# --- what the functions compute --------------------------------------------------------------------------------------


def mha(given):
    q, k, v = given["q"], given["k"], given["v"]
    assert given["causal"] is False and given["dropout_p"] == 0.0
    out, lse = reference.attend(q, k, v, scale=given["softmax_scale"])
    return (out.to(q.dtype), lse) if given["return_lse"] else out.to(q.dtype)


def fp8(given):
    q, k, v = (given[n].float() * given[f"{n}_descale"] for n in "qkv")
    assert all(given[f"{n}_descale"].shape == (1,) and given[f"{n}_descale"].dtype == torch.float32 for n in "qkv")
    return reference.attend(q, k, v, scale=given["softmax_scale"])[0].bfloat16()


def sage(given):
    """As AITER's: contiguous in one layout, bf16 out; keys centred unless smooth_k says no, and then (before #3334) the
    log-sum-exp of those.
    """
    tensors = [given[n] for n in "qkv"]
    assert given["layout"] in ("bshd", "bhsd") and all(t.is_contiguous() for t in tensors), (
        "its quantiser would write out of bounds"
    )
    turn = (lambda t: t.transpose(1, 2)) if given["layout"] == "bhsd" else (lambda t: t)
    q, k, v = map(turn, tensors)
    if given.get("smooth_k") is not False:
        k = k - k.mean(dim=1, keepdim=True)
    out, lse = reference.attend(q, k, v, scale=given.get("softmax_scale"))
    out = turn(out).contiguous().bfloat16()
    return (out, lse) if given.get("return_lse") else out


def sage_mxfp4(given):
    assert given["hadamard_rotation"] is True, "AITER asserts on this"
    return sage(given)


def v4(given):
    q, k, v = (given[n] for n in "qkv")
    assert all(t.is_contiguous() and t.dtype == torch.bfloat16 for t in (q, k, v))
    modes = [given.get(f"{n}_scale_mode") for n in "qkv"]
    assert all(modes) or not any(modes), "AITER wants all three or none"
    out, lse = reference.attend(q, k, v, scale=given["softmax_scale"])
    return (out.bfloat16(), lse) if given.get("return_lse") else out.bfloat16()


def flydsl(given):
    """gfx1201: equal heads; fp8 with a scale each; the first version masks no padding and takes no scale."""
    q, k, v = (given[n] for n in "qkv")
    assert given["causal"] is False and q.shape[2] == k.shape[2] and q.dtype == k.dtype == v.dtype
    if "softmax_scale" not in given and q.dtype != torch.float8_e4m3fn:
        assert q.shape[1] == k.shape[1] and q.shape[1] % 128 == 0, "padding would take part in the softmax"
    if q.dtype == torch.float8_e4m3fn:
        assert all(given[f"{n}_descale"].shape == (1,) and given[f"{n}_descale"].dtype == torch.float32 for n in "qkv")
        q, k, v = (given[n].float() * given[f"{n}_descale"] for n in "qkv")
    out, _ = reference.attend(q, k, v, scale=given.get("softmax_scale"))
    return out.to(torch.bfloat16 if given["q"].dtype == torch.float8_e4m3fn else q.dtype)


def flydsl_batch(given):
    """gfx1250, and gfx950 in fp8. Of a batch the kernel finds entries at entry * length rows."""
    q, k, v = (given[n] for n in "qkv")
    assert given["causal"] is False and (q.shape[0] == 1 or all(t.is_contiguous() for t in (q, k, v)))
    if q.shape[-1] != 128:
        return None
    if q.dtype == torch.float8_e4m3fn:
        return flydsl(given)
    out, lse = reference.attend(q, k, v, scale=given["softmax_scale"])
    return (out.to(q.dtype), lse) if given["return_lse"] else out.to(q.dtype)


def flydsl_quantised(given):
    """(q8, k8, v8, and their scales), rotated by an orthogonal matrix, which the scores do not see."""
    turn = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(3)))[0]
    q, k, v = (given[n].float() for n in "qkv")
    assert all(given[n].is_contiguous() and given[n].dtype == torch.bfloat16 for n in "qkv")
    pairs = [per_tensor_fp8(t, torch.float8_e4m3fn) for t in (q @ turn, k @ turn, v)]
    return [values for values, _ in pairs] + [descale for _, descale in pairs]


def v4_packed(given):
    """Scores are already scaled, and in base 2: the query quantiser does that. The one recipe that mha_v4 itself
    cannot be asked for.
    """
    per_32, per_tensor = AttentionScaleMode.E8M0_PER_1X32, AttentionScaleMode.F32_PER_TENSOR
    assert [given[f"{n}_scale_mode"] for n in "qkv"] == [per_32, per_32, per_tensor]
    q, k, v = (given[n].float() for n in "qkv")
    return reference.attend(q * math.log(2), k, v, scale=1.0)[0].bfloat16()


class AttentionFormat(enum.IntEnum):
    BF16 = 2
    FP8_E4M3 = 3
    FP8_E4M3_FNUZ = 4
    MXFP6 = 7
    MXFP4 = 9
    INT8 = 10


class AttentionScaleMode(enum.IntEnum):
    F32_PER_TENSOR = 1
    E8M0_PER_1X32 = 5


F = AttentionFormat
KNOWN = {
    (F.INT8, F.FP8_E4M3),
    (F.FP8_E4M3, F.FP8_E4M3),
    (F.FP8_E4M3, F.MXFP6),
    (F.MXFP6, F.FP8_E4M3),
    (F.MXFP6, F.MXFP6),
    (F.MXFP6, F.MXFP4),
    (F.MXFP4, F.FP8_E4M3),
    (F.MXFP4, F.MXFP4),
}


LATER = {(F.BF16, F.BF16), (F.BF16, F.FP8_E4M3)}  # from 0055212 on, which also brought block masks


def scale_modes(given, bf16=False):
    if (given["q_format"], given["v_format"]) not in KNOWN | (LATER if bf16 else set()):
        raise ValueError(f"unsupported Q/K format: {given['q_format'].name}")


COMPUTE = {
    "aiter/ops/mha.py:flash_attn_func": mha,
    "aiter/ops/mha.py:flash_attn_fp8_pertensor_func": fp8,
    "aiter/ops/triton/attention/mha.py:flash_attn_func": mha,
    "aiter/ops/triton/mha.py:flash_attn_func": mha,
    "aiter/ops/triton/attention/fav3_sage.py:fav3_sage_wrapper_func": sage,
    "aiter/ops/triton/attention/fav3_sage_attention_mxfp4_wrapper.py:fav3_sage_mxfp4_wrapper": sage_mxfp4,
    "aiter/ops/flydsl/fmha_kernels.py:flydsl_flash_attn_func": flydsl,
    "aiter/ops/flydsl/fmha_kernels.py:flydsl_flash_attn_batch_func": flydsl_batch,
    "aiter/ops/flydsl/fp8_quant.py:flydsl_fp8_quant": flydsl_quantised,
    "aiter/ops/mha_v4.py:mha_v4": v4,
    "aiter/ops/mha_v4.py:mha_v4_packed": v4_packed,
    "aiter/ops/mha_v4.py:scale_modes_for_formats": scale_modes,
    "aiter/ops/mha_v4.py:native_fp8_format": lambda given: F.FP8_E4M3,
    "aiter/ops/mha_v4.py:mha_v4_q_multiplier": lambda given: given["softmax_scale"] / math.log(2),
    "aiter/ops/mha_v4.py:quantize_mxfp8_q": lambda given: (given["input"].float() * given["multiplier"], torch.ones(1)),
    "aiter/ops/mha_v4.py:quantize_mxfp8_k": lambda given: (given["input"], torch.ones(1)),
    "aiter/ops/mha_v4.py:quantize_fp8": lambda given: (given["input"], torch.ones(1)),
}


# --- the package -----------------------------------------------------------------------------------------------------

BACKENDS = "flux2_pack.attention.backends."


def forget(monkeypatch, libraries=("aiter",)):
    """Take a library and our AITER backends out of sys.modules and the registry, for one test, and what the test
    imports out afterwards.
    """
    for name in [n for n in sys.modules if n.split(".")[0] in libraries]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("aiter", "aiter_flydsl", "aiter_triton", "aiter_v4"):
        monkeypatch.setitem(sys.modules, BACKENDS + name, None)  # so that monkeypatch knows the name
        del sys.modules[BACKENDS + name]
    monkeypatch.setattr(registry, "_modules", {})


class Library:
    """A fake `aiter` in sys.modules, taken out again by monkeypatch. folder: where its files would be, for tile
    files.
    """

    def __init__(self, monkeypatch, folder):
        self.monkeypatch, self.folder, self.fakes = monkeypatch, folder, {}
        forget(monkeypatch)
        self.package = self.module(
            "aiter", dtypes=types.SimpleNamespace(fp8=torch.float8_e4m3fn), core=types.SimpleNamespace(ENABLE_CK=True)
        )

    def module(self, name, **content):
        parent, _, last = name.rpartition(".")
        if parent and parent not in sys.modules:
            self.module(parent)
        made = types.ModuleType(name)
        made.__path__ = []
        made.__file__ = str(self.folder / (name.replace(".", "/") + ".py"))
        made.__dict__.update(content)
        self.monkeypatch.setitem(sys.modules, name, made)
        if parent:
            setattr(sys.modules[parent], last, made)
        return made

    def provide(self, functions):
        """Add recorded functions [{"file", "name", "parameters"}] to the modules they lie in; flash_attn_func also to
        the package itself.
        """
        for function in functions:
            path, name = function["file"], function["name"]
            module = path.removesuffix(".py").replace("/", ".")
            loaded = sys.modules.get(module) or self.module(module)
            fake = Fake(name, function["parameters"], COMPUTE.get(f"{path}:{name}", lambda given: None))
            if name == "scale_modes_for_formats":
                masks = any(f["name"] == "mha_v4" and ["block_mask", "optional"] in f["parameters"] for f in functions)
                fake.compute = lambda given, bf16=masks: scale_modes(given, bf16)
            self.fakes[f"{path}:{name}"] = fake
            setattr(loaded, name, fake)
            if path == "aiter/ops/mha.py":
                setattr(self.package, name, fake)
            if path == "aiter/ops/mha_v4.py":
                loaded.AttentionFormat, loaded.AttentionScaleMode = AttentionFormat, AttentionScaleMode
        return self

    def tiles(self, *archs):
        configs = self.folder / "aiter" / "ops" / "triton" / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        for arch in archs:
            (configs / f"{arch}-MHA-DEFAULT.json").write_text("{}")
        return self

    def backend(self, name):
        """A backend file, imported afresh over this library."""
        forget(self.monkeypatch, libraries=())
        return importlib.import_module(BACKENDS + name)

    def on(self, device, name):
        """A backend file that believes its tensors to be on `device` (attention.device.Device)."""
        module = self.backend(name)
        if hasattr(module, "describe"):
            self.monkeypatch.setattr(module, "describe", lambda _: device)
        return module

    def last(self, ending):
        """Arguments of the last call of the function whose "file:name" ends like this."""
        return next(f for key, f in self.fakes.items() if key.endswith(ending)).calls[-1]
