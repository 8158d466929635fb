"""Faults put into the product one at a time, and the tests that have to fail then: proof that the suite sees them.

  python tests/mutations.py                 all of them, a quarter of an hour on two cores
  python tests/mutations.py 3 17            some, by number
  python tests/mutations.py --list          what they are

Each is applied in a temporary copy of the tree, where the tests named with it run. 1 is returned when one of them
survives: then write the test that sees it. That every text is still where it is replaced is a test of the suite
(test_mutations.py). COMFYUI_PATH as in scripts/test.sh, by default the ComfyUI that it unpacks.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 900  # for the tests of one mutation, on a machine that does other things too


@dataclass(frozen=True)
class Mutation:
    """fault: what is wrong then. file: below the root, in which `old` is there once and becomes `new`. tests: arguments
    of pytest.
    """

    fault: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # --- attention/
    Mutation(
        "a mask that was changed in place between two steps is taken for the old one",
        "attention/dispatch.py",
        "        self._masks.forget()\n",
        "",
        "tests/test_attention_masks.py -k between_two_steps",
    ),
    Mutation(
        "a mask that was changed in place is taken for the old one although it has a version",
        "attention/masks.py",
        "known[1] == version(mask)",
        "True",
        "tests/test_attention_masks.py -k until_it_changes",
    ),
    Mutation(
        "a mask that adds a bias is taken for one that only hides keys",
        "attention/masks.py",
        "if row.dtype != torch.bool and bool((row[keep] != 0).any()):",
        "if False:",
        "tests/test_attention_masks.py -k do_more",
    ),
    Mutation(
        "a quantised kernel computes where the model asks for full precision",
        "attention/dispatch.py",
        "if full_precision and slug != registry.AUTO and not registry.row(slug).exact:",
        "if False:",
        "tests/test_attention_override.py -k full_precision",
    ),
    Mutation(
        "the last steps of a schedule are one too few",
        "attention/dispatch.py",
        "step >= steps - self.last_steps",
        "step > steps - self.last_steps",
        "tests/test_attention_override.py -k schedules_of",
    ),
    Mutation(
        "a compiled graph computes for the selection that it was traced with",
        "attention/dispatch.py",
        "return _current.dispatcher or (traced if traced is not None and not traced.hooked else None)",
        "return traced",
        "tests/test_attention_override.py -k running_model",
    ),
    Mutation(
        "a call that was delegated is not counted",
        "attention/override.py",
        "self.dispatcher.count(result, computed_by=name_of(computing))",
        "pass",
        "tests/test_attention_reports.py -k leaves_attention",
    ),
    Mutation(
        "a kernel that indexes with 32 bits is given tensors beyond them",
        "attention/call.py",
        "if self.max_offset and call.last_offset >= self.max_offset:",
        "if False:",
        "tests/test_attention_call.py",
    ),
    Mutation(
        "the scale of a call is dropped",
        "attention/backends/sdpa.py",
        "attn_mask=mask, scale=scale, enable_gqa",
        "attn_mask=mask, scale=None, enable_gqa",
        "tests/test_attention_backends.py -k scale",
    ),
    Mutation(
        "a log-sum-exp of another layout is passed on",
        "attention/adapter.py",
        "if flat.ndim != 3 or flat.shape[:2] != (b, h) or flat.shape[2] < s:",
        "if False:",
        "tests/test_attention_backends.py -k another_layout",
    ),
    Mutation(
        "a backend whose test call gives a wrong result is used",
        "attention/registry.py",
        "if error < PROBE_ERROR",
        "if True",
        "tests/test_attention_backends.py -k probe",
    ),
    Mutation(
        "auto takes a fast backend that is wrong",
        "attention/autotune.py",
        "elif candidate.error is not None and candidate.error > max(ERROR_FACTOR * sdpa_error, ERROR_FLOOR):",
        "elif False:",
        "tests/test_attention_auto.py -k fast_but_wrong",
    ),
    Mutation(
        "a disk that refuses auto's file stops the image",
        "attention/autotune.py",
        "except OSError as error:\n            log.warning",
        "except KeyError as error:\n            log.warning",
        "tests/test_attention_auto.py -k disk",
    ),
    Mutation(
        "a report is of the newest sampling instead of the one that made the latent",
        "attention/run_log.py",
        "if latent is not None and run.latent == latent:",
        "if False:",
        "tests/test_select_model.py -k belongs_to_its_latent",
    ),
    Mutation(
        "the log-sum-exp of joined parts is that of one of them",
        "attention/parallel/lse_merge.py",
        "torch.logaddexp(lse, part_lse)",
        "torch.maximum(lse, part_lse)",
        "tests/test_parallel_attention.py -k merge",
    ),
    Mutation(
        "rows that saw no key bring their NaN into a merge",
        "attention/parallel/lse_merge.py",
        "return torch.where((lse == NO_KEYS).transpose(1, 2).unsqueeze(-1), 0, part)",
        "return part.clone()",
        "tests/test_parallel_attention.py -k merge",
    ),
    Mutation(
        "a kernel whose latents are near is noise, however far its attention calls are off",
        "attention/measuring/statistics.py",
        " and (attention is None or attention <= thresholds.attention_ratio):",
        ":",
        "tests/test_measure.py -k verdicts_at",
    ),
    Mutation(
        "an attention head that computes something else is hidden among the others",
        "attention/measuring/statistics.py",
        "worst[1].worst_head <= thresholds.head_error",
        "worst[1].total <= thresholds.head_error",
        "tests/test_measure.py",
    ),
    # --- flux2/: files, prompts, memory
    Mutation(
        "tensors of a file may overlap",
        "flux2/checkpoints/header.py",
        "        if first != end:\n",
        "        if False:\n",
        "tests/test_checkpoint.py -k lying",
    ),
    Mutation(
        "a model folder's index may name files outside the folder",
        "flux2/checkpoints/header.py",
        'or any(mark in file for mark in "/\\\\:\\0")',
        "",
        "tests/test_checkpoint.py -k bad_indexes",
    ),
    Mutation(
        "a text encoder is named after the first sample of each weight alone",
        "flux2/loading/fingerprint.py",
        "for number in range(SAMPLES):",
        "for number in range(1):",
        "tests/test_prompt_encode.py -k four_samples",
    ),
    Mutation(
        "a lazy encoder's prompts are kept under the name of a file that was replaced before it was read",
        "flux2/loading/lazy_clip.py",
        "                self.source = source_of(self.clip)\n",
        "",
        "tests/test_prompt_encode.py -k replaced_before",
    ),
    Mutation(
        "encoded padding is one token too short",
        "flux2/loading/reference_padding.py",
        "missing = LENGTH - out.shape[1]",
        "missing = LENGTH - 1 - out.shape[1]",
        "tests/test_loaders.py -k reference_padding",
    ),
    Mutation(
        "a model that is kept on the GPU is moved off it when others need the room",
        "flux2/loading/memory.py",
        "return super().detach(unpatch_all and not self.loaded_size())",
        "return super().detach(unpatch_all)",
        "tests/test_memory.py -k keep_on_gpu",
    ),
    Mutation(
        "layer by layer leaves layers on the GPU",
        "flux2/loading/memory.py",
        "min(extra_memory, LEAST)",
        "extra_memory",
        "tests/test_memory.py -k layer_by_layer",
    ),
    Mutation(
        "a damaged entry of the prompt cache is believed",
        "flux2/prompts/cache.py",
        '            and metadata.get("digest") == digest_of(tensors, metadata["plain"], metadata["notes"])\n',
        "",
        "tests/test_prompt_cache.py -k damaged",
    ),
    Mutation(
        "prompts that another ComfyUI encoded are found",
        "flux2/prompts/encode.py",
        '        "comfyui": comfyui_version.__version__,\n',
        "",
        "tests/test_prompt_encode.py -k another_comfyui",
    ),
    Mutation(
        "prompts that another PyTorch encoded are found",
        "flux2/prompts/encode.py",
        '        "torch": torch.__version__,\n',
        "",
        "tests/test_prompt_encode.py -k another_comfyui",
    ),
    Mutation(
        "prompts of an encoder with a LoRA are kept under the name of the one without",
        "flux2/prompts/encode.py",
        "    if patched:\n",
        "    if False:\n",
        "tests/test_prompt_encode.py -k changed_or_foreign",
    ),
    Mutation(
        "a long prompt loses its beginning instead of its end",
        "flux2/prompts/tokens.py",
        "[row[:limit]]",
        "[row[-limit:]]",
        "tests/test_prompt_encode.py -k long_prompt",
    ),
    Mutation(
        "the seed of an improved prompt changes nothing",
        "flux2/upsampling/upsample.py",
        "        torch.manual_seed(self.seed)\n",
        "",
        "tests/test_prompt_upsample.py -k seed_decides",
    ),
    Mutation(
        "numbers that overflowed are drawn from",
        "flux2/upsampling/upsample.py",
        "if scores.isnan().any():",
        "if False:",
        "tests/test_prompt_upsample.py -k overflow",
    ),
    Mutation(
        "the alpha of a LoRA is read as 1",
        "flux2/lora/load.py",
        'layer.parts["alpha"] = float(layer.parts["alpha"].float().reshape(-1)[0])',
        'layer.parts["alpha"] = 1.0',
        "tests/test_lora.py -k formula",
    ),
    Mutation(
        "a value that was changed since is lost on the way back from a converted workflow",
        "flux2/workflows/rules.py",
        "if widget.new in now and now[widget.new] != before.get(widget.new):",
        "if False:",
        "tests/test_convert_workflow.py -k changed_since",
    ),
    # --- flux2/: blocks
    Mutation(
        "the modulation of a LayerNorm is by scale instead of 1 + scale",
        "flux2/fused/kernels/norm.py",
        "value = normed * (1.0 + scale) + shift",
        "value = normed * scale + shift",
        "tests/fast_blocks_interpreted.py -k epsilon",
    ),
    Mutation(
        "reference images at timestep zero get the image's gate",
        "flux2/fused/blocks.py",
        "add_gated(x, hidden, mod2.gate, segment=segment, finite",
        "add_gated(x, hidden, mod2.gate, finite",
        "tests/fast_blocks_interpreted.py -k keeps_its_fused_blocks",
    ),
    Mutation(
        "the fp8 copy of a weight is used after the weight was moved",
        "flux2/fused/fp8_rowwise.py",
        "if kept and kept[0] == linear.weight.data_ptr():",
        "if kept:",
        "tests/fast_blocks_interpreted.py -k has_been_moved",
    ),
    Mutation(
        "fp8 copies of weights take the room that what comes next needs",
        "flux2/fused/fp8_rowwise.py",
        " and comfy.model_management.get_free_memory(device) > ROOM",
        "",
        "tests/fast_blocks_interpreted.py -k take_the_room",
    ),
    Mutation(
        "a cancel is not heard in compiled blocks",
        "flux2/compiled/blocks.py",
        "comfy.model_management.throw_exception_if_processing_interrupted()  # the layers",
        "pass  # the layers",
        "tests/test_speed_nodes.py -k cancel_inside",
    ),
    Mutation(
        "the VAE's fused blocks lose gradients",
        "flux2/vae/prepare.py",
        "if not self.fused or options or needs_gradients or",
        "if not self.fused or options or",
        "tests/vae_blocks_interpreted.py -k gradients",
    ),
    # --- flux2/: several GPUs
    Mutation(
        "the same rank gets the tokens that are left over of each kind",
        "flux2/parallel/shards.py",
        "split_evenly(image, ranks, text % ranks)",
        "split_evenly(image, ranks)",
        "tests/test_split.py -k every_token",
    ),
    Mutation(
        "a mask stays in the order of the whole sequence",
        "flux2/parallel/attention.py",
        "mask = mask.index_select(3, columns)",
        "mask = mask",
        "tests/test_split.py -k every_rank_predicts",
    ),
    Mutation(
        "image and reference tokens come back in the order of the ranks",
        "flux2/parallel/forward.py",
        "return torch.cat([*pieces[::2], *pieces[1::2]], dim=1)",
        "return whole",
        "tests/test_split.py -k every_rank_predicts",
    ),
    Mutation(
        "a process that does not know the secret may join",
        "flux2/parallel/workers/channel.py",
        'raise Stranger("The other end does not know the secret of this session.")',
        "pass",
        "tests/test_ranks.py -k without_the_secret",
    ),
    Mutation(
        "a message that was changed on its way is believed",
        "flux2/parallel/workers/channel.py",
        "if not hmac.compare_digest(self.tag(data), tag):",
        "if self.tag(data) is None:",
        "tests/test_parallel_security.py -k changed_on_the_way",
    ),
    Mutation(
        "a message may be repeated",
        "flux2/parallel/workers/channel.py",
        "self.number += 1",
        "self.number += 0",
        "tests/test_parallel_security.py -k what_the_other_end_sent",
    ),
    Mutation(
        "callbacks that change weights on rank 0 alone are let through",
        "flux2/parallel/workers/patch_transfer.py",
        'CHANGING_CALLBACKS = ("on_load_after", "on_pre_run", "on_prepare_state", "on_inject_model")',
        "CHANGING_CALLBACKS = ()",
        "tests/test_ranks.py -k cannot_be_carried",
    ),
    Mutation(
        "patches inside the network stay on rank 0",
        "flux2/parallel/workers/patch_transfer.py",
        'return name.startswith("diffusion_model") or name == "manual_cast_dtype"',
        "return False",
        "tests/test_ranks.py -k cannot_be_carried",
    ),
    Mutation(
        "a rank that loaded other weights takes part",
        "flux2/parallel/workers/session.py",
        'if answer["digest"] != digest]',
        "if False]",
        "tests/test_ranks.py -k replaced_on_disk",
    ),
    Mutation(
        "a model is loaded on the other GPUs whether there is room or not",
        "flux2/parallel/workers/session.py",
        "                self._make_room(replica.bytes_on_device(patcher))\n",
        "",
        "tests/test_ranks.py -k room_is_asked",
    ),
]


def copy_of_the_tree(folder):
    """The files of this tree, without what is not the pack's: environments, caches, version control."""
    skip = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.pyc", ".pytest_cache", ".ruff_cache")
    return shutil.copytree(ROOT, Path(folder) / "flux2-attention", ignore=skip)


def survives(mutation, tree):
    """ "" when the tests named with a mutation fail in a copy of the tree to which it is applied; else what happened
    instead.
    """
    file = tree / mutation.file
    whole = file.read_text(encoding="utf-8")
    if whole.count(mutation.old) != 1:
        return f"the text is {whole.count(mutation.old)} times in {mutation.file}"
    file.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
    interpret = "1" if "_interpreted" in mutation.tests else "0"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split()]
    try:
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return ""  # waiting for ever is failing, in the suite too
    finally:
        file.write_text(whole, encoding="utf-8")
    if done.returncode == 1 and " failed" in done.stdout:
        return ""
    return "the tests pass" if done.returncode == 0 else f"pytest ended with {done.returncode}: {done.stdout[-2000:]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", type=int, help="of mutations; all without any")
    parser.add_argument("--list", action="store_true", help="print them and their tests")
    given = parser.parse_args()
    chosen = given.numbers or range(1, len(MUTATIONS) + 1)
    if given.list:
        print("\n".join(f"{n}. {MUTATIONS[n - 1].fault}: {MUTATIONS[n - 1].tests}" for n in chosen))
        return 0
    sys.path.insert(0, str(ROOT / "scripts"))
    import environment

    os.environ["COMFYUI_PATH"] = str(environment.comfyui(environment.cache_folder()))
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="flux2-mutations-") as folder:
        tree = copy_of_the_tree(folder)
        for number in chosen:
            mutation = MUTATIONS[number - 1]
            why = survives(mutation, tree)
            survivors += bool(why)
            print(f"{number}. {mutation.fault}: {f'SURVIVES, {why}' if why else 'dies'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} die.")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
