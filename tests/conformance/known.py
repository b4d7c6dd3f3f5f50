"""Tests of PEFT that pass with stock layers and not with fused ones, each with its reason."""

KNOWN = {
    "tests/test_initialization.py::TestLoraInitialization::test_modules_to_save_targets_lora_layer_raises": (
        "compares an error message that contains the class path `peft.tuners.lora.layer.Linear`; "
        "a fused layer's is `peftkit.fuse.linear.Linear`"
    ),
    "tests/test_initialization.py::TestLoraInitialization::test_lora_use_dora_linear": (
        "asks for the bits of nn.Linear from a DoRA that has not been trained, which the fused norm gives to rounding only: "
        "2.4e-6 from float64 at worst, where nn.Linear and PEFT are 1.1e-6 from it"
    ),
    "tests/test_target_parameters.py::TestTargetParameters::test_target_parameter_result_caching_works": (
        "counts how often PEFT forms W + B A in a forward; the fused forward never forms it"
    ),
}
