"""Starts from base weights on quantised bases: definitions, errors that fall, PEFT's results, and mistakes."""

import itertools

import init_cases as cases
import models
import pytest
import torch
import transformers as hf
from base_cases import llama_config, save_llama
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.loftq_utils import _low_rank_decomposition

from peftkit import ContractError, explain, initialise, load_base, wrap
from peftkit_kernels.storage.nf4.weight import LEVELS

pytestmark = pytest.mark.usefixtures("one_thread")

BASES = ("nf4", "int8", "fp32")
QUANTISED = ("nf4", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.saved(tmp_path_factory.mktemp("base"))


def largest_step(linear):
    """The most that one rounding to the nearest value changes an element, as ``[N, 1]`` or ``[N, K]``."""
    if type(linear.weight).__name__ == "Int8Params":
        # 127 steps, after a rounding to float16
        return linear.weight.SCB.double()[:, None] * (0.5 / 127 + 2.0**-11)
    gap = max(b - a for a, b in itertools.pairwise(LEVELS)) / 2
    weight = cases.decoded(linear)
    blocks = weight.abs().reshape(-1, 64).amax(1)
    # the maximum of a block is stored in 8 bits; half a step of it is below 1 %
    return (gap + 0.02) * blocks.repeat_interleave(64).view(weight.shape)


@pytest.mark.parametrize("base", QUANTISED)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_wrap_splits_the_decoded_weight(folder, base, init):
    """The factors are the best approximation of their rank, and base and factors together are the weight up to one rounding."""
    before = {n: W for n, (W, _) in cases.parts(cases.adapted(folder, base)).items()}
    model = cases.adapted(folder, base, init)
    found = cases.parts(model)
    assert found.keys() == before.keys()
    for name, (Q, update) in found.items():
        U, S, Vh = torch.linalg.svd(before[name])
        best = U[:, :4] * S[:4] @ Vh[:4]
        # float32 decompositions, and the share of the fifth value that four power iterations leave
        slack = 1e-5 if init == "pissa" else (S[4] / S[3]).item() ** 4
        assert cases.relative(update - best, best) <= slack, name
        layer = model.get_base_model().get_submodule(name).base_layer
        assert ((Q + update - before[name]).abs() <= largest_step(layer) + 1e-6).all(), name
        assert cases.relative(Q - before[name], before[name]) > 0.1
    assert explain(model.train()).fused_fraction == 1.0


@pytest.mark.parametrize("base", QUANTISED)
def test_the_first_forward_is_the_bases_up_to_the_rounding(folder, base):
    """Its error is below that which quantising the original weights has made."""
    exact = cases.logits(load_base(folder, "fp32"))
    plain = load_base(folder, base, dtype="float32")
    start = cases.logits(plain)
    moved = cases.relative(cases.logits(cases.adapted(folder, base, "pissa")) - start, start)
    assert 0 < moved < cases.relative(start - exact, exact)


def test_an_8_bit_base_that_has_run_is_multiplied_with_its_new_weights(folder):
    """The codes of the last forward are kept beside the weight."""
    for init in ("pissa", "olora"):
        model = load_base(folder, "int8", dtype="float32")
        start = cases.logits(model)
        again = cases.logits(wrap(model, cases.configured(init)))
        assert 0 < cases.relative(again - start, start) < 0.05


@pytest.mark.parametrize("base", QUANTISED)
@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_fits_what_the_quantisation_lost(folder, base, iterations):
    W = cases.originals(folder)
    model = cases.adapted(folder, base)
    before = {n: Q for n, (Q, _) in cases.parts(model).items()}
    report = initialise(model, "loftq", folder, iterations=iterations)
    for row in report.layers:
        Q, update = cases.parts(model)[row.name]
        truth = W[row.name]
        assert row.error_before == pytest.approx(
            cases.relative(truth - before[row.name], truth), rel=1e-4
        )
        assert row.error_after == pytest.approx(cases.relative(truth - Q - update, truth), rel=1e-4)
        assert row.error_after < row.error_before
        if iterations == 1:
            assert torch.equal(Q, before[row.name])
            # Eckart and Young: what is left are the other singular values
            rest = torch.linalg.svdvals(truth - Q)[4:].norm() / truth.norm()
            assert row.error_after == pytest.approx(rest.item(), rel=1e-4)
    assert len(report.layers) == 6
    assert report.error_after < report.error_before
    assert report.base_changed == (iterations > 1)


def test_more_iterations_of_loftq_fit_better(folder):
    errors = [
        initialise(cases.adapted(folder), "loftq", folder, iterations=n).error_after for n in (1, 5)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("base", QUANTISED)
def test_pissa_of_the_original_weights_is_nearer_to_them_than_the_plain_base(folder, base):
    """QPiSSA: the residual has a smaller range than the weight, so it is quantised in smaller steps."""
    model = cases.adapted(folder, base)
    report = initialise(model, "pissa", folder)
    assert report.error_after < report.error_before
    W = cases.originals(folder)
    Q, update = cases.parts(model)[cases.PICKED]
    row = next(row for row in report.layers if row.name == cases.PICKED)
    expected = cases.relative(W[cases.PICKED] - Q - update, W[cases.PICKED])
    assert row.error_after == pytest.approx(expected, rel=1e-4)


def test_loftqs_factors_are_pefts_divided_by_the_scale(folder):
    """PEFT's function needs a GPU; the decomposition inside it does not."""
    model = cases.adapted(folder)
    initialise(model, "loftq", folder)
    Q, update = cases.parts(model)[cases.PICKED]
    rest = (cases.originals(folder)[cases.PICKED] - Q).float()
    found = _low_rank_decomposition(rest, 4)
    assert cases.relative(update - found["L"].double() @ found["R"].double(), update) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_use_double_quant": False},
    ],
    ids=["bf16 storage", "plain maxima"],
)
def test_bases_of_transformers_keep_their_settings(folder, settings):
    config = hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        **settings,
    )
    base = hf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    start = cases.logits(base)
    linear = base.get_submodule(cases.PICKED)
    before = linear.weight
    model = wrap(base, cases.configured("pissa"))
    after = linear.weight
    assert after is not before
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    assert after.quant_state.nested == before.quant_state.nested
    assert after.quant_state.dtype is before.quant_state.dtype
    assert linear.quant_state is after.quant_state
    assert 0 < cases.relative(cases.logits(model) - start, start) < 0.2


def test_fp4_is_refused_by_name(folder):
    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    base = hf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(ContractError, match="stored as fp4; only nf4 and int8"):
        wrap(base, cases.configured("pissa"))
    assert not hasattr(base, "peft_config")


def test_wrap_reads_loftqs_weights_from_where_the_base_was_loaded(folder):
    by_wrap = wrap(load_base(folder, "nf4", dtype="float32"), cases.loftq())
    by_call = cases.adapted(folder)
    initialise(by_call, "loftq", folder)
    for name, (Q, update) in cases.parts(by_wrap).items():
        assert torch.equal(Q, cases.parts(by_call)[name][0])
        assert torch.equal(update, cases.parts(by_call)[name][1])
    # the base is unchanged, so this is a plain LoRA adapter
    assert by_wrap.peft_config["default"].init_lora_weights is True
    assert not by_wrap.peft_config["default"].loftq_config


@pytest.mark.parametrize("base", BASES)
def test_olora_equals_pefts(folder, base):
    """PEFT requantises too. It rounds one product differently, so codes may differ by one step in a few places."""
    plain = get_peft_model(load_base(folder, base, dtype="float32"), cases.configured("olora"))
    model = cases.adapted(folder, base)
    initialise(model, "olora")
    theirs, ours = cases.parts(plain), cases.parts(model)
    assert ours.keys() == theirs.keys()
    for name, (Q, update) in ours.items():
        assert cases.relative(update - theirs[name][1], update) < 1e-6
        same = (Q - theirs[name][0]).abs() <= 1e-6 * Q.abs().max()
        assert same.double().mean() > 0.999


def test_pissa_of_a_dense_base_equals_pefts(folder):
    plain = get_peft_model(load_base(folder, "fp32"), cases.configured("pissa"))
    model = cases.adapted(folder, "fp32")
    report = initialise(model, "pissa")
    for name, (W, update) in cases.parts(model).items():
        for mine, theirs in zip((W, update), cases.parts(plain)[name], strict=True):
            assert cases.relative(mine - theirs, mine) < 1e-5, name
    assert report.error_before == 0
    assert report.error_after < 1e-6


def test_olora_of_a_conv1d_keeps_the_function():
    """PEFT subtracts the transposed part: its result differs by as much as the outputs are large."""
    ids = {"input_ids": models.batch("gpt2")["input_ids"]}
    start = models.tiny("gpt2").eval()(**ids).logits.detach()
    settings = {"r": 4, "target_modules": ["attn.c_proj"], "init_lora_weights": "olora"}
    for put_on, low, high in ((wrap, 0, 1e-5), (get_peft_model, 0.1, 10)):
        config = LoraConfig(fan_in_fan_out=True, **settings)
        model = put_on(models.tiny("gpt2").eval(), config).eval()
        assert low <= cases.relative(model(**ids).logits - start, start) <= high
    config = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="olora")
    model = wrap(models.tiny("gpt2"), config).eval()
    assert cases.relative(model(**ids).logits - start, start) < 1e-5


def test_weights_of_a_conv1d_are_read_transposed(tmp_path):
    config = models.tiny("gpt2").config
    config.update({"n_embd": 64, "n_inner": 128})
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    settings = LoraConfig(r=4, target_modules=["c_attn", "attn.c_proj"])
    for base in ("nf4", "fp32"):
        model = wrap(load_base(tmp_path, base, dtype="float32"), settings)
        report = initialise(model, "pissa", tmp_path)
        assert report.error_before < 0.2
        assert report.error_after <= max(report.error_before, 1e-6)


@pytest.mark.parametrize("base", QUANTISED)
def test_dora_has_the_norms_of_the_start(folder, base):
    """So that the first forward is that of LoRA."""
    model = cases.adapted(folder, base, "pissa", use_dora=True)
    plain = cases.adapted(folder, base, "pissa")
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            magnitude = layer.lora_magnitude_vector["default"].weight.double()
            A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            norms = (cases.decoded(layer.base_layer) + layer.scaling["default"] * B @ A).norm(dim=1)
            torch.testing.assert_close(magnitude, norms, rtol=1e-5, atol=0)
    expected = cases.logits(plain)
    # each row of each of the 14 layers is off by at most what its magnitude is
    assert (cases.logits(model) - expected).norm() <= 14 * 1e-5 * expected.norm()


def test_ranks_and_scales_of_single_layers(folder):
    changes = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True}
    model = cases.adapted(folder, "nf4", **changes)
    report = initialise(model, "loftq", folder)
    assert {row.rank for row in report.layers} == {2, 4}
    W = cases.originals(folder)
    for row in report.layers:
        Q, update = cases.parts(model)[row.name]
        U, S, Vh = torch.linalg.svd(W[row.name] - Q)
        best = U[:, : row.rank] * S[: row.rank] @ Vh[: row.rank]
        assert cases.relative(update - best, best) < 1e-4


def test_layers_that_are_kept_have_a_start_too(folder):
    """A layer in 16 or 32 bits is split for PiSSA and keeps its default start for LoftQ."""
    model = wrap(load_base(folder, "nf4", ["v_proj"], dtype="float32"), cases.configured("pissa"))
    assert all(update.norm() > 0 for _, update in cases.parts(model).values())
    model = wrap(load_base(folder, "nf4", ["v_proj"], dtype="float32"), cases.configured())
    report = initialise(model, "loftq", folder)
    assert len(report.layers) == 4
    assert set(report.left) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert model.get_base_model().get_submodule(cases.PICKED).lora_A["default"].weight.norm() > 0


def test_the_report_can_be_read(folder):
    report = initialise(cases.adapted(folder), "loftq", folder)
    text = str(report)
    assert "model.layers.*.self_attn.q_proj" in text
    assert f"{100 * report.error_before:.2f} %" in text
    assert f"{100 * report.error_after:.2f} %" in text
    assert "base weights unchanged" in text
    assert str(folder) in text
    assert report.to_dict()["error_after"] == report.error_after


def test_mistakes_are_named_and_change_nothing(folder, tmp_path):
    model = cases.adapted(folder)
    before = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    torch.manual_seed(1)
    hf.LlamaForCausalLM(llama_config(initializer_range=0.5)).save_pretrained(tmp_path / "other")
    save_llama(tmp_path / "narrow", intermediate_size=64)
    cases.adapted(folder).get_base_model().save_pretrained(tmp_path / "quantised")
    for message, arguments in {
        "init='pisa' is unknown": ("pisa",),
        "init='pissa_niter_0' is unknown": ("pissa_niter_0",),
        "is not in the model, which has 'default'": ("pissa", None, "other"),
        "has other weights than the base": ("loftq", tmp_path / "other"),
        "but the model's is": ("loftq", tmp_path / "narrow"),
        "has no tensor|not a quantised one": ("loftq", tmp_path / "quantised"),
        "weights='nowhere' is not the checkpoint": ("loftq", "nowhere"),
    }.items():
        with pytest.raises(ContractError, match=message):
            initialise(model, *arguments)
    with pytest.raises(ContractError, match="iterations=2 has no effect for init='pissa'"):
        initialise(model, "pissa", iterations=2)
    with pytest.raises(ContractError, match="without adapters"):
        initialise(load_base(folder, "nf4"), "pissa")
    with pytest.raises(ContractError, match="no layer of adapter 'default' can be"):
        initialise(cases.adapted(folder, "fp32"), "loftq", folder)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_adapter_is_initialised_once_and_alone(folder):
    model = cases.adapted(folder, "nf4", "pissa")
    with pytest.raises(ContractError, match="was initialised before"):
        initialise(model, "pissa")
    with pytest.raises(ContractError, match="is not new: lora_B of 6 layers is not zero"):
        initialise(cases.trained(cases.adapted(folder)), "loftq", folder)
    model = cases.adapted(folder)
    model.add_adapter("second", cases.configured())
    with pytest.raises(ContractError, match="other adapters, which need the base weights"):
        initialise(model, "pissa")
    # the base of the other adapter stays as it is
    assert initialise(model, "loftq", folder, "second").error_after > 0


def test_inits_that_a_quantised_base_cannot_have(folder):
    for init in ("mica", "orthogonal", "corda"):
        config = cases.configured()
        config.init_lora_weights = init
        base = load_base(folder, "nf4")
        with pytest.raises(ContractError, match=f"init_lora_weights={init!r} needs base weights"):
            wrap(base, config)
        assert not hasattr(base, "peft_config")
    with pytest.raises(ContractError, match="loftq_bits=8, but the base is stored in 4 bits"):
        wrap(load_base(folder, "nf4"), cases.loftq(bits=8))
    with pytest.raises(ContractError, match="this base is not quantised"):
        wrap(load_base(folder, "fp32"), cases.loftq())


def test_wrap_leaves_the_model_unchanged_if_it_cannot_start(folder, tmp_path):
    base = load_base(folder, "nf4")
    base.name_or_path = str(tmp_path)
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ContractError, match=r"weights=.* is not the checkpoint"):
        wrap(base, cases.loftq())
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert not hasattr(base, "peft_config")
