"""Plans: as large as real steps, the same from few layers as from all, and nothing is changed or loaded."""

import resource
import time
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from planning import cases
from transformers import AutoModelForCausalLM

from peftkit import ContractError, MemoryPlan, PrefixConfig, load_base, plan, wrap
from peftkit.planning import planner

BENCHMARK = cases.benchmark()
FAST = [
    BENCHMARK.PlannedCase("llama", "lora"),
    BENCHMARK.PlannedCase("llama", "all three", checkpointing=True),
    BENCHMARK.PlannedCase("llama", "dora", "nf4"),
    BENCHMARK.PlannedCase("qwen3_moe", "lora", batch_size=2),
    BENCHMARK.PlannedCase("t5", "full", batch_size=1),
    BENCHMARK.PlannedCase("olmoe", "houlsby", "nf4", 2, 64),
    BENCHMARK.PlannedCase("gpt_oss", "lora", "nf4", 2, 64, checkpointing=True),
    BENCHMARK.PlannedCase("resnet", "full", batch_size=9),
    BENCHMARK.PlannedCase("convnext", "full", "bf16", batch_size=2),
    BENCHMARK.PlannedCase("efficientnet", "full", batch_size=2),
    BENCHMARK.PlannedCase("wav2vec2_ctc", "lora", batch_size=2, seq_len=4000),
    BENCHMARK.PlannedCase("segformer", "full", batch_size=2),
    BENCHMARK.PlannedCase("clip", "full", batch_size=2, seq_len=32),
    BENCHMARK.PlannedCase("bert_answers", "lora", batch_size=2, seq_len=32),
]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_the_peak_is_that_of_a_real_step(case):
    (row,) = BENCHMARK.rows([case])
    assert row["planned_bytes"] > row["loaded_bytes"]
    assert BENCHMARK.error_of(row) <= BENCHMARK.MEDIAN_BOUND


@pytest.mark.parametrize(
    ("config", "configs", "options"),
    [
        (cases.llama(11), (), {}),
        (cases.llama(11), (LoraConfig(r=4, use_dora=True),), {"checkpointing": True}),
        (cases.gemma3(20), (PrefixConfig(num_virtual_tokens=4),), {}),
        (cases.llama(11), (), {"device": "H100"}),
    ],
    ids=["LoRA", "DoRA", "layers of two kinds", "GPU"],
)
def test_few_layers_tell_the_plan_of_many(config, configs, options):
    given = {"device": "cpu", "batch_size": 2, "seq_len": 64} | options
    short = plan(config, *configs, **given)
    with mock.patch.object(planner, "_WHOLE", 1000):
        whole = plan(config, *configs, **given)
    assert short.settings == whole.settings
    for name in ("peak_bytes", "items", "phase", "module", "peaks", "loaded_bytes", "trained"):
        assert getattr(short, name) == getattr(whole, name), name
    assert (short.parameters, short.allocated_bytes) == (whole.parameters, whole.allocated_bytes)


def test_no_layer_is_dropped_at_random():
    def peak(dropped):
        config = BENCHMARK.config_of(BENCHMARK.PlannedCase("wav2vec2", "full"))
        config.layerdrop = dropped
        return plan(config, "full", device="cpu", batch_size=2, seq_len=4000).peak_bytes

    assert {peak(0.9) for _ in range(3)} == {peak(0.0)}


def test_an_image_has_a_usual_size_if_the_config_says_none():
    config = BENCHMARK.config_of(BENCHMARK.PlannedCase("resnet", "full"))
    images = torch.zeros(2, 3, 224, 224)
    batch = {"pixel_values": images, "labels": torch.zeros(2, dtype=torch.long)}
    made, given = (
        plan(config, "full", device="cpu", **options)
        for options in ({"batch_size": 2}, {"batch": batch})
    )
    assert made.peak_bytes == given.peak_bytes > 2 * images.nbytes


_WIDTHS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_PAIR = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
}
OTHERS = {
    # its weights are transposed in place when they are made
    "rwkv": (
        "RwkvForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "attention_hidden_size": 64},
    ),
    # its sound is a spectrogram
    "ast": (
        "ASTForAudioClassification",
        _WIDTHS | {"max_length": 64, "num_mel_bins": 32, "patch_size": 8},
    ),
    # it looks for the end of each text
    "bart": (
        "BartForSequenceClassification",
        _PAIR | {"d_model": 64, "vocab_size": 256, "pad_token_id": 0, "eos_token_id": 2},
    ),
    # its labels are spectrograms; layers are dropped at random in a real step
    "speecht5": (
        "SpeechT5ForTextToSpeech",
        _PAIR
        | {"hidden_size": 64, "vocab_size": 60, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_kinds(name, monkeypatch):
    monkeypatch.setitem(BENCHMARK.MODELS, name, OTHERS[name])
    monkeypatch.setattr(BENCHMARK, "_AS_PLANNED", tuple(OTHERS))
    (row,) = BENCHMARK.rows([BENCHMARK.PlannedCase(name, "full", batch_size=2, seq_len=32)])
    assert BENCHMARK.error_of(row) <= BENCHMARK.MEDIAN_BOUND


def test_models_that_need_other_inputs_are_refused_with_a_way_out():
    config = BENCHMARK.config_of(BENCHMARK.PlannedCase("bert", "full"))
    config.architectures = ["BertForMultipleChoice"]
    with pytest.raises(ContractError, match=r"no training step runs on inputs made .* batch="):
        plan(config, "full", device="cpu", auto_class="AutoModelForMultipleChoice")


def test_items_are_those_of_arithmetic():
    config = cases.llama()
    made = plan(config, LoraConfig(r=4, target_modules="all-linear"), device="cpu", seq_len=64)
    real = wrap(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear")
    )
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert made.trained == trained
    assert made.parameters == sum(p.numel() for p in real.parameters())
    assert made.items["trained weights"] == 4 * trained
    steps = 4 * len(
        [p for p in real.parameters() if p.requires_grad]
    )  # one counter for each tensor
    assert made.items["optimizer state"] == 2 * 4 * trained + steps
    assert sum(made.items.values()) == made.peak_bytes == max(made.peaks.values())
    assert made.reserved_bytes == made.peak_bytes


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_quantised_weights_are_as_large_as_those_of_bitsandbytes(base):
    config = cases.llama()
    made = plan(config, base=base, device="cpu", seq_len=16)
    real = load_base(AutoModelForCausalLM.from_config(config), base)
    sizes = BENCHMARK._bytes_of([*real.parameters(), *real.buffers(), *BENCHMARK._of_storage(real)])
    assert made.items["frozen weights"] == sizes


@pytest.mark.parametrize("model", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_stacks_of_experts_in_4_bits_are_as_large_as_real_ones(model):
    case = BENCHMARK.PlannedCase(model, "lora", "nf4")
    config = BENCHMARK.config_of(case)
    made = plan(config, LoraConfig(r=16), base="nf4", device="cpu", seq_len=16)
    real = AutoModelForCausalLM.from_config(config)
    values = sum(p.numel() for p in real.parameters())
    real = load_base(real, "nf4")
    sizes = BENCHMARK._bytes_of([*real.parameters(), *real.buffers(), *BENCHMARK._of_storage(real)])
    assert made.items["frozen weights"] == sizes < 2 * values  # of 4 bytes before
    assert made.parameters - made.trained == values
    on_gpu = plan(config, LoraConfig(r=16), base="nf4", device="H100", seq_len=16)
    assert (on_gpu.parameters, on_gpu.multiplied) == (made.parameters, made.multiplied)


def test_optimisers_by_their_state():
    def state(optimizer):
        made = plan(cases.llama(1), "full", device="cpu", seq_len=16, optimizer=optimizer)
        return made.items.get("optimizer state", 0)

    sizes = [p.numel() for p in AutoModelForCausalLM.from_config(cases.llama(1)).parameters()]
    blocks = [8 * n if n < 4096 else 2 * n + 8 * -(-n // 256) for n in sizes]
    assert state("adamw_8bit") == sum(blocks)
    assert state("adamw_fused") == 8 * sum(sizes) + 4 * len(sizes)
    assert 0 < state("adafactor") < 0.5 * sum(sizes)
    assert state("sgd") == 0


def test_a_model_of_70_billion_parameters_needs_seconds_and_little_memory():
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    config = cases.llama(80, **sizes, num_key_value_heads=8, vocab_size=128256)
    config.dtype = torch.bfloat16
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = plan(config, base="nf4", device="H100", seq_len=4096, checkpointing=True)
    assert time.monotonic() - start < 60
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2e9
    assert 70.5e9 < made.parameters < 71e9
    embeddings = 2 * 2 * 8192 * 128256
    layers = 70.55e9 - embeddings / 2 - made.trained
    assert made.items["frozen weights"] == pytest.approx(0.516 * layers + embeddings, rel=0.01)


def test_a_passed_model_stays_as_it_is_and_is_planned_as_it_is():
    config = cases.llama()
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    before = {n: (p, p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    partial = plan(model, "partial", device="cpu", seq_len=32)
    assert partial.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan(model, "full", device="cpu", seq_len=32).trained > partial.trained
    for name, parameter in model.named_parameters():
        same, values, trains = before[name]
        assert parameter is same
        assert torch.equal(parameter, values)
        assert parameter.requires_grad == trains
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.isfinite().all()


def test_a_plan_leaves_nothing_behind():
    def loss_and_gradients():
        torch.manual_seed(0)
        base = load_base(AutoModelForCausalLM.from_config(cases.llama()), "nf4")
        model = wrap(base, LoraConfig(r=4, target_modules="all-linear")).train()
        ids = torch.arange(64).view(1, 64)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    before = loss_and_gradients()
    plan(cases.llama(), LoraConfig(r=4, target_modules="all-linear"), base="nf4", device="cpu")
    after = loss_and_gradients()
    assert all(map(torch.equal, before, after))
    assert before[0].isfinite()


def test_adapters_of_stock_peft_are_planned_with_its_own_code():
    adapters = LoraConfig(r=4, target_modules="all-linear")
    stock = get_peft_model(AutoModelForCausalLM.from_config(cases.llama()), adapters)
    options = {"device": "cpu", "batch_size": 4, "seq_len": 64}
    own = plan(cases.llama(), adapters, **options)
    assert plan(stock, **options).peak_bytes > own.peak_bytes
    wrapped = plan(wrap(stock.unload(), adapters), **options)
    # copies of the rotary frequencies, which the model has twice, no longer share memory
    assert 0 <= wrapped.peak_bytes - own.peak_bytes < 256


def test_on_a_gpu_its_own_kernels_are_planned():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = cases.llama(3, **sizes | {"max_position_embeddings": 1024})
    options = {"batch_size": 2, "seq_len": 512}
    hopper = plan(config, base="bf16", device="H100", **options)
    turing = plan(config, base="fp16", device="T4", **options)  # Triton does not run there
    assert hopper.basis == turing.basis == "predicted"
    own, other = (made.peak_bytes - made.items["workspaces of cuBLAS"] for made in (hopper, turing))
    assert hopper.items["activations: layers"] > 0.3 * own  # whole layers as one op
    assert other > own
    assert "activations: MLP" in turing.items
    assert "activations: MLP" not in hopper.items
    assert hopper.reserved_bytes >= hopper.peak_bytes
    logits = 2 * 512 * 512 * 4
    assert hopper.items["logits and loss"] < 3 * logits


def test_what_a_plan_shows():
    made = plan(cases.llama(), device="cpu", seq_len=32)
    text = str(made)
    for part in ("frozen weights", "peak", "before the first step", "trained", "basis: CPU"):
        assert part in text
    assert len(made.bar(50)) == 50
    assert MemoryPlan(**made.to_dict()) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"seq_len": 1.5}, "seq_len=1.5 must be"),
        ({"optimizer": "lion"}, "optimizer='lion' is unknown; use one of 'adamw'"),
        ({"device": "A100"}, "device='A100' is not clear; use 'cpu'"),
        ({"base": "int2"}, "base='int2' is no kind of base"),
        ({"auto_class": "LlamaModel"}, "computes no loss"),
    ],
)
def test_errors_name_argument_value_and_way_out(changes, message):
    with pytest.raises(ContractError, match=message):
        plan(cases.llama(), device="cpu", **changes) if "device" not in changes else plan(
            cases.llama(), **changes
        )


def test_a_method_that_is_unknown():
    with pytest.raises(ContractError, match="'everything' cannot be planned"):
        plan(cases.llama(), "everything", device="cpu")
