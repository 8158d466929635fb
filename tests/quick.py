"""Which tests `-m quick` runs, beside those that say so themselves: together they execute every module of attention/,
flux2/ and nodes/ in under 90 seconds on two cores. conftest.py gives them the mark.

QUICK: {file: beginnings of the names of its tests, without "test_"; none for all of them}. Named are the tests that are
short and need no server; a new module's first test belongs here.
"""

QUICK = {
    # attention/
    "test_aiter": (),
    "test_attention_auto": (),
    "test_attention_backends": (),
    "test_attention_call": (),
    "test_attention_masks": (),
    "test_attention_override": (),
    "test_attention_reports": (),
    "test_badge": (),
    "test_cudnn_fp8": ("it_refuses", "versions", "other_hardware", "without_the_library"),
    "test_foreign_devices": ("pytorchs_own", "auto"),
    "test_imports": ("imports_go_one_way", "an_old_pytorch"),
    "test_measure": (),
    "test_parallel_attention": (
        "merge",
        "ranks_are_numbered",
        "alone",
        "auto",
        "what_is_asked",
        "degrees",
        "the_cost",
        "times",
    ),
    "test_symmetric_memory": (),
    # flux2/: files, prompts, memory
    "test_checkpoint": (
        *("header", "what_is_no", "lying", "truncated", "bad_indexes", "folders", "choices", "names_that", "a_link"),
        *(
            "published",
            "other_files",
            "mistral",
            "weights",
            "a_shard",
            "number_formats",
            "wrong",
            "incomplete",
            "sizes",
        ),
    ),
    "test_convert_workflow": (
        "an_api_workflow",
        "the_pages_command",
        "what_stays",
        "the_way_back_gives",
        "links_follow",
        "a_graph_of_two",
    ),
    "test_encoder_attention": ("the_conditioning", "a_backend"),
    "test_encoder_precision": ("weights_that_need",),
    "test_help": ("an_error", "every_topic", "errors_of_others"),
    "test_loader_nodes": (),
    "test_loaders": ("small_files_load", "tokens_agree", "template_is", "reference_padding_is"),
    "test_lora": ("every_kind_is", "dora_of_peft", "alphas_of_peft", "files_that_are_no_lora", "strength_zero"),
    "test_memory": ("auto_is", "cpu_when_idle", "keep_on_gpu", "layer_by_layer", "modes_survive_clones"),
    "test_prompt_cache": ("what_was_written", "every_part", "a_damaged", "prompts_are_lines", "control_characters"),
    "test_prompt_encode": (
        "miss_and_hit",
        "a_hit_reads",
        "each_of_four",
        "what_another",
        "special_tokens",
        "the_nodes",
    ),
    "test_prompt_upsample": ("it_ends", "layers_whose", "pictures_are_prepared", "the_node"),
    "test_quantised_files": ("other_quantisers", "model_info_says"),
    "test_select_model": ("each_backend", "a_report_belongs", "a_schedule_follows_the_samplers"),
    # flux2/: blocks, measuring
    "test_compare": ("a_backend_and_itself", "the_benchmark_times", "without_matplotlib"),
    "test_speed_nodes": ("a_compiler_that_fails", "what_a_machine", "steps_are_timed", "flags_put", "installing_twice"),
    "test_vae_blocks": ("without_a_gpu", "another_network", "the_memory", "rocm_gets", "two_threads"),
    # flux2/: several GPUs
    "test_parallel_security": ("what_is_passed", "number_formats", "a_worker_loads", "what_a_worker"),
    "test_ranks": ("the_report_says_what", "every_rank_takes", "a_rank_joins_through"),
    "test_split": ("every_token", "a_rank_without", "other_models", "heads_that"),
    # nodes/
    "test_mutations": (),
    "test_object_info": ("a_change", "a_node_that", "what_is_appended", "files_of_a_machine"),
}


def is_quick(file, name):
    """Whether a test function of a file (its stem) is marked here."""
    beginnings = QUICK.get(file)
    return beginnings is not None and name.startswith(tuple(f"test_{one}" for one in beginnings or ("",)))
