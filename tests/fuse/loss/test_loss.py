"""The logit-free loss of whole models, compared with stock transformers and PEFT."""

import copy

import models
import pytest
import torch
import transformers as hf
from causal import DECODER, FAMILIES, LORA, AllDouble, pair, peft_model
from cross_entropy_cases import LargestResult
from peft import LoraConfig, get_peft_model

from peftkit.fuse.loss import LazyLogits, install_logit_free, logit_free_status, remove_logit_free
from peftkit_kernels.ops.linear_cross_entropy import config as sizes


def grads_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(actual, expected, relative=1e-10):
    assert actual.keys() == expected.keys()
    assert actual
    for name, grad in actual.items():
        size = expected[name].abs().max()
        assert size > 0, name
        assert (grad - expected[name]).abs().max() <= relative * size, name


def assert_same_training(stock, ours, batch=None, relative=1e-10):
    """Assert that the loss and every gradient are equal, and that ``ours`` does not compute its logits."""
    batch = batch or models.batch("llama")
    with AllDouble():
        expected = stock(**batch).loss
        expected_grads = grads_of(stock, expected)
        output = ours(**batch)
        assert type(output.logits) is LazyLogits
        actual_grads = grads_of(ours, output.loss)
        assert output.logits._real is None
    assert abs(output.loss - expected) <= relative * abs(expected)
    assert_same_grads(actual_grads, expected_grads, relative)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_stock_in_float64(family):
    assert_same_training(*pair(family))


@pytest.mark.parametrize("count", [5, torch.tensor(5)], ids=["int", "tensor"])
def test_num_items_in_batch(count):
    stock, ours = pair()
    assert_same_training(stock, ours, {**models.batch("llama"), "num_items_in_batch": count})


def test_ignore_index():
    stock, ours = pair()
    batch = models.batch("llama")
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 7)
    assert_same_training(stock, ours, {**batch, "ignore_index": 7})


NOTHING = {
    "mean": {},
    "int": {"num_items_in_batch": 0},
    "tensor": {"num_items_in_batch": torch.tensor(0)},
    "other items": {"num_items_in_batch": 3},
    "ignore_index": {"ignore_index": 7},
    "shift_labels": {"shift_labels": None},
}


@pytest.mark.parametrize("head", ["frozen", "adapter", "trained"])
@pytest.mark.parametrize("options", NOTHING)
def test_a_batch_without_supervised_tokens(options, head):
    """The loss (NaN, or 0 over other items) and the gradients (0) equal those of transformers' own loss."""
    config = {
        "frozen": {},
        "adapter": {"target_modules": ["q_proj", "lm_head"]},
        "trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }
    batch, options = models.batch("llama"), dict(NOTHING[options])
    batch["labels"] = torch.full_like(batch["labels"], options.get("ignore_index", -100))
    if "shift_labels" in options:
        options["shift_labels"] = batch["labels"]
    results = []
    for model in pair(dtype=torch.float32, **config[head]):
        output = model(**batch, **options)
        results.append((output, grads_of(model, output.loss)))
    (expected, expected_grads), (output, grads) = results
    assert type(output.logits) is LazyLogits
    assert output.logits._real is None
    assert expected.loss.isnan() == (options.get("num_items_in_batch") != 3)
    torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=0, equal_nan=True)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name
        assert not grad.any(), name


def test_supervised_tokens_over_no_items():
    stock, ours = pair(dtype=torch.float32)
    batch = {**models.batch("llama"), "num_items_in_batch": 0}
    assert ours(**batch).loss == stock(**batch).loss == torch.inf


def test_shift_labels():
    stock, ours = pair()
    batch = models.batch("llama")
    shifted = torch.full_like(batch["labels"], -100)
    shifted[:, 2:9] = batch["labels"][:, 1:8]
    assert_same_training(stock, ours, {**batch, "shift_labels": shifted})


def test_logits_to_keep():
    stock, ours = pair()
    batch = models.batch("llama")
    batch["labels"] = batch["labels"][:, -6:]
    assert_same_training(stock, ours, {**batch, "logits_to_keep": 6})


def test_labels_by_position():
    stock, ours = pair()
    batch = models.batch("llama")
    parameters = list(hf.LlamaForCausalLM.forward.__wrapped__.__code__.co_varnames[1:])
    before = [batch.get(name) for name in parameters[: parameters.index("labels") + 1]]
    expected = stock.get_base_model()(*before)
    output = ours.get_base_model()(*before)
    assert type(output.logits) is LazyLogits
    torch.testing.assert_close(output.loss.float(), expected.loss)
    assert type(ours.get_base_model()(*before[:-1], None).logits) is torch.Tensor


def test_lora_on_the_head():
    assert_same_training(*pair(target_modules=["q_proj", "lm_head"]))


def test_lora_on_a_softcapped_head():
    assert_same_training(*pair("gemma2", target_modules=["q_proj", "lm_head"]))


def test_trained_copy_of_the_head():
    assert_same_training(*pair(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_disabled_adapters():
    stock, ours = pair(target_modules=["q_proj", "lm_head"])
    batch = models.batch("llama")
    with stock.disable_adapter(), ours.disable_adapter(), AllDouble():
        expected, output = stock(**batch), ours(**batch)
    assert type(output.logits) is LazyLogits
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-10, atol=0.0)


def test_merged_head():
    stock, ours = pair(target_modules=["q_proj", "lm_head"])
    stock.merge_adapter()
    ours.merge_adapter()
    with AllDouble():
        expected, output = stock(**models.batch("llama")), ours(**models.batch("llama"))
    assert type(output.logits) is LazyLogits
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-10, atol=0.0)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "Dora"),
        ({"lora_dropout": 0.1}, "dropout 0.1"),
        ({"lora_bias": True}, "without bias"),
    ],
    ids=["dora", "dropout", "lora_bias"],
)
def test_a_head_that_cannot_be_fused_runs_itself(config, reason):
    model = peft_model(**{"target_modules": ["q_proj", "lm_head"], **config})
    assert reason in install_logit_free(model)
    assert reason in logit_free_status(model)[1]
    assert type(model(**models.batch("llama")).logits) is torch.Tensor


def test_a_head_that_changes_after_installing():
    """The state of the head at the time of the forward counts."""
    stock, ours = pair(target_modules=["q_proj"])
    for model in (stock, ours):
        torch.manual_seed(2)
        config = LoraConfig(**{**LORA, "target_modules": ["lm_head"]})
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    assert_same_training(stock, ours)
    for model in (stock, ours):
        torch.manual_seed(3)
        model.add_adapter("third", LoraConfig(**{**LORA, "target_modules": ["lm_head"]}))
        model.base_model.set_adapter(["default", "second", "third"])
    assert logit_free_status(ours) == (False, "the output head has 2 active adapters")
    output = ours(**models.batch("llama"))
    assert type(output.logits) is torch.Tensor
    torch.testing.assert_close(output.loss, stock(**models.batch("llama")).loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    _, ours = pair()
    ours.enable_input_require_grads()
    batch = models.batch("llama")
    expected = grads_of(ours, ours(**batch).loss)
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    output = ours(**batch)
    assert type(output.logits) is LazyLogits
    for name, grad in grads_of(ours, output.loss).items():
        assert torch.equal(grad, expected[name]), name


def test_a_deep_copy_is_independent():
    stock, ours = pair(target_modules=["q_proj", "lm_head"])
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_same_training(stock, twin)
    remove_logit_free(twin)
    assert type(twin(**models.batch("llama")).logits) is torch.Tensor
    assert type(ours(**models.batch("llama")).logits) is LazyLogits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_model_with_float32_adapters(dtype):
    """The error against float64 is at most twice that of the stock model."""
    stock, ours = pair(dtype=dtype, target_modules=["q_proj", "lm_head"])
    truth = copy.deepcopy(stock).double()
    batch = models.batch("llama")
    with AllDouble():
        true_loss = truth(**batch).loss
    true_grads = grads_of(truth, true_loss)
    results = []
    for model in (stock, ours):
        loss = model(**batch).loss
        assert loss.dtype == torch.float32
        grads = grads_of(model, loss)
        assert {g.dtype for g in grads.values()} == {torch.float32}
        # One error for all gradients together, because the error of a single small gradient may be small by chance.
        error = sum((grads[n] - true_grads[n]).square().sum() for n in true_grads).sqrt()
        results.append((abs(loss - true_loss), error))
    (stock_loss, stock_error), (our_loss, our_error) = results
    rounding = torch.finfo(dtype).eps * true_loss
    assert our_loss <= 2 * stock_loss + rounding
    assert our_error <= 2 * stock_error


def test_autocast():
    stock, ours = pair(dtype=torch.float32, target_modules=["q_proj", "lm_head"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, output = stock(**models.batch("llama")), ours(**models.batch("llama"))
    assert type(output.logits) is LazyLogits
    assert output.logits.dtype == expected.logits.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps * expected.logits.abs().max()
    assert abs(output.loss - expected.loss) <= rounding
    assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["frozen", "adapter"])
def test_never_forms_the_logits(targets, monkeypatch):
    monkeypatch.setattr(sizes, "_CPU_CHUNK_BYTES", 1)
    config = hf.LlamaConfig(**{**DECODER, "vocab_size": 2048})
    lora = LoraConfig(**{**LORA, "target_modules": targets})
    model = get_peft_model(hf.LlamaForCausalLM(config), lora)
    labels = torch.randint(0, 2048, (2, 40))
    with LargestResult() as stock:
        model(input_ids=labels, labels=labels).loss.backward()
    assert stock.numel == 2 * 40 * 2048
    assert install_logit_free(model) is None
    with LargestResult() as ours:
        model(input_ids=labels, labels=labels).loss.backward()
    # Chunks have at least 16 rows; the head itself is 32 wide.
    assert ours.numel == 32 * 2048


def test_compiled_model_runs_stock_without_graph_break():
    stock, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    compiled = torch.compile(ours.get_base_model(), backend="eager", fullgraph=True)
    output = compiled(**batch)
    assert type(output.logits) is torch.Tensor
    torch.testing.assert_close(output.loss, stock(**batch).loss)
    torch._dynamo.reset()
