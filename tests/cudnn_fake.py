"""A module `cudnn` that builds graphs as nvidia-cudnn-frontend 1.32 does and computes `sdpa_fp8` on the CPU from what
it is handed: dimensions, strides, kinds and scales are taken from the graph and the buffers, not from the adapter.
"""

import types

import torch

KINDS = types.SimpleNamespace(
    FP8_E4M3=torch.float8_e4m3fn, FLOAT=torch.float32, BFLOAT16=torch.bfloat16, HALF=torch.float16
)


class Tensor:
    def __init__(self, dim=None, stride=None, data_type=None, name=None):
        self.dim, self.stride, self.data_type, self.output = dim, stride, data_type, False

    def set_output(self, value):
        self.output = value
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_data_type(self, kind):
        self.data_type = kind
        return self

    def seen_in(self, buffers):
        """The buffer in the graph's own dimensions and strides. The kind must be the one that was declared."""
        buffer = buffers[self]
        assert buffer.dtype == self.data_type
        return torch.as_strided(buffer, self.dim or buffer.shape, self.stride or buffer.stride())


class Graph:
    """cudnn.pygraph."""

    def __init__(self, **_):
        self.built = []

    def tensor(self, **options):
        return Tensor(**options)

    def sdpa_fp8(self, q, k, v, *scales, attn_scale, generate_stats, name):
        assert len(scales) == 6
        self.inputs, self.scales, self.scale = (q, k, v), scales, attn_scale
        self.outputs = (Tensor(), Tensor() if generate_stats else None, Tensor(), Tensor())
        return self.outputs

    def __getattr__(self, step):
        if step not in ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"):
            raise AttributeError(step)
        return lambda *_: self.built.append(step)

    def get_workspace_size(self):
        assert self.built[-1] == "build_plans"
        return 16

    def execute(self, buffers, workspace, handle=None):
        assert workspace.numel() >= 16
        q, k, v = (tensor.seen_in(buffers).double() for tensor in self.inputs)
        down_q, down_k, down_v, down_s, up_s, up_o = (tensor.seen_in(buffers).double() for tensor in self.scales)
        scores = (q * down_q) @ (k * down_k).transpose(-1, -2) * self.scale
        lse = scores.logsumexp(-1, keepdim=True)
        top = scores.amax(-1, keepdim=True)
        chances = ((scores - top).exp() * up_s).float().to(torch.float8_e4m3fn).double() * down_s
        out = chances @ (v * down_v) / (lse - top).exp()
        raw, stats = self.outputs[:2]
        raw.seen_in(buffers).copy_((out * up_o).float())
        if stats:
            stats.seen_in(buffers).copy_(lse)


def module(version=91900):
    """What `import cudnn` gives."""
    found = types.ModuleType("cudnn")
    found.pygraph, found.data_type = Graph, KINDS
    found.heur_mode = types.SimpleNamespace(A="A")
    found.backend_version = lambda: version
    found.create_handle = lambda: object()
    found.set_stream = lambda handle, stream: None
    return found
