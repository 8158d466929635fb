"""DoRA: a change of a weight whose rows or columns get learned lengths.

  W' = s * (W + D) / |W + D|,   D the change of a LoRA, LoKr or LoHa, s the learned lengths

(Liu and others, "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, equation 5; PEFT and LyCORIS compute the same.)
ComfyUI's own adapters divide by |W| instead where the lengths are those of rows, which PEFT and LyCORIS write; so this
one wraps them and takes from them only D.
"""

import comfy.weight_adapter
import torch


class Decomposed(comfy.weight_adapter.WeightAdapterBase):
    """`weights` is (adapter, scale): an adapter of ComfyUI without lengths of its own, and the lengths, (out, 1) or
    (out) for rows, (1, in) for columns.
    """

    name = "dora"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weights=None,
    ):
        """Changes `weight` (out, in) in place and returns it; the lengths are computed in float32."""
        adapter, scale = self.weights
        exact = weight.float()
        merged = adapter.calculate_weight(exact.clone(), key, 1.0, 1.0, None, lambda change: change)
        scale = scale.to(weight.device, torch.float32)
        square_columns = scale.ndim > 1 and scale.shape[-1] == scale.numel() == weight.shape[1]
        of_rows = scale.numel() == len(weight) and not square_columns
        scale = scale.reshape((-1, 1) if of_rows else (1, -1))
        lengths = merged.norm(dim=1 if of_rows else 0, keepdim=True)
        merged *= scale / (lengths + torch.finfo(torch.float32).eps)
        weight += function(strength * (merged - exact)).to(weight.dtype)
        return weight
