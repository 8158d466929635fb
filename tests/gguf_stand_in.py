"""A MODEL that behaves like one of a GGUF loader of another pack, for tests; written for these tests.

  model = gguf_model(state_dict)          # of a FLUX.2 diffusion model in ComfyUI's keys
  write(file, state_dict)                 # a file that the loader of this stand-in reads, of a format of its own
  install(folder)                         # the stand-in as a pack in a custom_nodes folder, under the real one's names

What such a loader does differently from ComfyUI's, and this stand-in too: weights of linear layers are packed tensors
of a class of their own (here: int8 in groups of 32 with a scale each), whose `shape` is that of the numbers they stand
for, and which stay the same object where nothing has to move; a layer unpacks its weight at each call and adds the
patches then; state_dict gives the packed size alone; the patcher is a subclass that hands patches to the tensors; the
advanced loader's settings are kept in the class of the layers; and nothing says how to load the model a second time.
"""

import inspect
from pathlib import Path

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch

GROUP = 32


class Packed(torch.Tensor):
    """(rows, columns / 32, 36) uint8: 32 signed numbers and the bytes of a float32 scale. numbers: the shape meant."""

    def __new__(cls, data, numbers, patches=()):
        made = data.as_subclass(cls)
        made.numbers, made.patches = numbers, list(patches)
        return made

    @property
    def shape(self):
        return getattr(self, "numbers", None) or self.size()

    def to(self, *args, **kwargs):
        made = super().to(*args, **kwargs)
        made.numbers, made.patches = self.shape, list(getattr(self, "patches", ()))
        return made

    def clone(self, *args, **kwargs):
        return self

    def detach(self):
        return self


def pack(weight):
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    data = torch.round(groups / scale).to(torch.int8).view(torch.uint8)
    return Packed(torch.cat((data, scale.contiguous().view(torch.uint8)), -1), weight.shape)


def unpack(packed):
    raw = packed.as_subclass(torch.Tensor)
    numbers = raw[..., :GROUP].contiguous().view(torch.int8).float() * raw[..., GROUP:].contiguous().view(torch.float32)
    return numbers.reshape(tuple(packed.shape))


class Ops(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        comfy_cast_weights = True
        dequant_dtype = patch_dtype = None

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.weight = torch.nn.Parameter(state_dict[f"{prefix}weight"], requires_grad=False)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[f"{prefix}weight"] = torch.empty(self.weight.size(), device="meta")

        def forward_comfy_cast_weights(self, x):
            weight = self.weight
            if isinstance(weight, Packed):
                numbers = unpack(weight).to(self.dequant_dtype or torch.float32)
                for patches, key in weight.patches:
                    numbers = comfy.lora.calculate_weight(patches, numbers, key)
                weight = numbers
            return torch.nn.functional.linear(x, weight.to(x.device, x.dtype))


class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
    patch_on_device = False

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **options):
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, Packed):
            return super().patch_weight_to_device(key, device_to, inplace_update, **options)
        if key in self.patches:
            weight.patches = [(self.patches[key], key)]

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for weight in self.model.parameters() if unpatch_weights else ():
            if isinstance(weight, Packed):
                weight.patches = []
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args, force_patch_weights=False, **options):
        super().load(*args, force_patch_weights=True, **options)

    def clone(self, *args, **kwargs):
        made = super().clone(*args, **kwargs)
        made.__class__ = GGUFModelPatcher
        return made


def packed_weights(weights):
    """{name: packed}: those of vectors and of the outermost layers stay as they are."""
    return {
        name: pack(value) if value.ndim == 2 and "_blocks." in name else value.float()
        for name, value in weights.items()
    }


def gguf_model(weights):
    """The MODEL of packed weights."""
    return model_of(packed_weights(weights))


def model_of(packed):
    model = comfy.sd.load_diffusion_model_state_dict(packed, model_options={"custom_operations": Ops})
    model.__class__ = GGUFModelPatcher
    return model


def unpacked(weights):
    """The state dict of the numbers that `gguf_model` computes with."""
    return {
        name: unpack(pack(value)) if value.ndim == 2 and "_blocks." in name else value.float()
        for name, value in weights.items()
    }


# --- the stand-in as a pack: a node, its files, its folder ------------------------------------------------------------


def write(file, weights):
    packed = {name: value.as_subclass(torch.Tensor) for name, value in packed_weights(weights).items()}
    torch.save({name: (value, tuple(weights[name].shape)) for name, value in packed.items()}, file)
    return file


class UnetLoaderGGUF:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load_unet", "stand-in"

    @classmethod
    def INPUT_TYPES(cls):
        import folder_paths

        folders = folder_paths.get_folder_paths("diffusion_models")
        return {"required": {"unet_name": ([file.name for folder in folders for file in Path(folder).glob("*.gguf")],)}}

    def load_unet(self, unet_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None):
        import folder_paths

        for name, value in (("dequant_dtype", dequant_dtype), ("patch_dtype", patch_dtype)):
            setattr(Ops.Linear, name, None if value in (None, "default") else getattr(torch, value))
        stored = torch.load(folder_paths.get_full_path("unet", unet_name), mmap=True, weights_only=True)
        model = model_of(
            {name: Packed(value, torch.Size(shape)) if value.dtype == torch.uint8 else value
             for name, (value, shape) in stored.items()}
        )  # fmt: skip
        model.patch_on_device = patch_on_device
        return (model,)


class UnetLoaderGGUFAdvanced(UnetLoaderGGUF):
    pass


NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": UnetLoaderGGUF, "UnetLoaderGGUFAdvanced": UnetLoaderGGUFAdvanced}


def install(custom_nodes, name="ComfyUI-GGUF"):
    """The folder of the pack."""
    folder = Path(custom_nodes) / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from .nodes import NODE_CLASS_MAPPINGS\n")
    (folder / "nodes.py").write_text("import nodes\n" + Path(inspect.getsourcefile(install)).read_text())
    return folder
