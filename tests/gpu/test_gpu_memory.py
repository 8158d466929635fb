"""Memory modes with the memory of the GPU that is here: tests of test_memory.py whose card is a stand-in elsewhere."""

import pytest

from test_memory import (
    card,
    dev_folder,
    files,
    load,
    no_gradients,
    test_a_cancelled_sampling_leaves_the_card_too,
    test_a_large_idle_encoder_does_not_start_on_the_card,
    test_an_ordinary_vae_device_node_copies_an_idle_vae,
    test_auto_is_comfyui_as_it_is,
    test_cpu_when_idle_leaves_the_card_after_each_use,
    test_idle_keeps_other_models_on_the_card,
    test_keep_on_gpu_stays_whoever_needs_the_room,
    test_layer_by_layer_never_counts_the_layers_as_loaded,
    test_modes_survive_clones_and_loras,
    test_modes_survive_reloading_for_another_device,
    test_room_for_a_kept_model_is_what_fits,
)

pytestmark = pytest.mark.gpu(cpu=False)
