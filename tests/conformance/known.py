"""Tests of PEFT that pass with stock layers and not with fused ones, each with its reason."""

KNOWN = {
    "tests/test_initialization.py::TestLoraInitialization::test_modules_to_save_targets_lora_layer_raises": (
        "compares an error message that contains the class path `peft.tuners.lora.layer.Linear`; "
        "a fused layer's is `peftkit.lora.layers.Linear`"
    ),
}
