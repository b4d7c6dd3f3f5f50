"""The logit-free loss of whole models against stock transformers and PEFT."""

import copy

import models
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftkit.loss import LazyLogits, install_logit_free, logit_free_status, remove_logit_free
from peftkit_kernels.linear_cross_entropy import torch_impl

DECODER = {
    "vocab_size": models.VOCAB_SIZE,
    "hidden_size": models.HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The grouped product of experts has no float64.
MOE = {
    "experts_implementation": "eager",
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
OTHERS = {
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **DECODER,
            head_dim=8,
            query_pre_attn_scalar=8,
            final_logit_softcapping=7.0,
            tie_word_embeddings=False,
        )
    ),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**DECODER, logits_scaling=3.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**DECODER, logit_scale=0.3)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**DECODER, **MOE, num_local_experts=4)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**DECODER, **MOE, head_dim=8, num_experts=4, moe_intermediate_size=16)
    ),
}
FAMILIES = (*models.CAUSAL_NAMES, *OTHERS)
LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "c_attn"],
    "init_lora_weights": False,
}


class AllDouble(TorchFunctionMode):
    """Turns the models' casts to float32 (norms, routers, the stock loss) into casts to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, LazyLogits):
                self.numel = max(self.numel, tensor.numel())
        return result


def base_model(name="llama", dtype=torch.float64):
    if name in models.CAUSAL_NAMES:
        return models.tiny(name, dtype=dtype)
    torch.manual_seed(0)
    model = OTHERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).train()


def peft_model(name="llama", dtype=torch.float64, **config):
    torch.manual_seed(1)
    config = LoraConfig(**{**LORA, "fan_in_fan_out": name == "gpt2", **config})
    return get_peft_model(base_model(name, dtype), config)


def pair(name="llama", dtype=torch.float64, **config):
    """The same PEFT model twice, the second one logit-free."""
    stock = peft_model(name, dtype, **config)
    ours = copy.deepcopy(stock)
    assert install_logit_free(ours) is None
    return stock, ours


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
    """Loss and every gradient equal, and the logits of ``ours`` never formed."""
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
    """What the head is at the time of the forward counts."""
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
    """As close to float64 as the stock model is, within a factor of two."""
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
        # One error for all gradients together: a single small one may be lucky in either model.
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


def test_never_forms_the_logits(monkeypatch):
    monkeypatch.setattr(torch_impl, "_CPU_CHUNK_BYTES", 1)
    config = hf.LlamaConfig(**{**DECODER, "vocab_size": 2048})
    model = get_peft_model(hf.LlamaForCausalLM(config), LoraConfig(**LORA))
    labels = torch.randint(0, 2048, (2, 40))
    with LargestResult() as stock:
        model(input_ids=labels, labels=labels).loss.backward()
    assert stock.numel == 2 * 40 * 2048
    assert install_logit_free(model) is None
    with LargestResult() as ours:
        model(input_ids=labels, labels=labels).loss.backward()
    # Chunks of 16 rows at least; the head itself is 32 wide.
    assert ours.numel == 32 * 2048


def test_compiled_model_runs_stock_without_graph_break():
    stock, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    compiled = torch.compile(ours.get_base_model(), backend="eager", fullgraph=True)
    output = compiled(**batch)
    assert type(output.logits) is torch.Tensor
    torch.testing.assert_close(output.loss, stock(**batch).loss)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["t5", "bert", "vit"])
def test_other_models_are_left_alone(name):
    model = models.tiny(name)
    before = models_state(model)
    reason = install_logit_free(model)
    assert type(model).__name__ in reason
    assert logit_free_status(model) == (False, reason)
    remove_logit_free(model)
    assert models_state(model) == before


def models_state(model):
    """Every attribute of every module, by identity; hooks and children by their keys and values."""
    return {
        name: {
            key: list(map(id, (*value.keys(), *value.values())))
            if isinstance(value, dict)
            else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_removing_restores_the_model_exactly(family):
    """GPT-2 carries a loss function of its own instance, set by its user."""
    model = peft_model(family)
    if family == "gpt2":
        model.get_base_model().loss_function = model.get_base_model().loss_function
    before = models_state(model)
    batch = models.batch("llama")
    expected = model(**batch)
    assert install_logit_free(model) is None
    assert install_logit_free(model) is None
    model(**batch).loss.backward()
    model.zero_grad()
    remove_logit_free(model)
    assert models_state(model) == before
    output = model(**batch)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)
    remove_logit_free(model)
    assert models_state(model) == before


def test_outside_a_forward_with_labels_nothing_differs():
    stock, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    installed = models_state(ours)
    ours(**batch)
    assert models_state(ours) == installed
    labels = batch.pop("labels")
    assert labels is not None
    assert type(ours(**batch).logits) is torch.Tensor
    assert torch.equal(ours(**batch).logits, stock(**batch).logits)
    stock.eval()
    ours.eval()
    generated = ours.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, stock.generate(**batch, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_is_cut_off(error):
    _, ours = pair(dtype=torch.float32)
    batch = models.batch("llama")
    installed = models_state(ours)

    def fail(*args):
        raise error("cut off")

    # After the head, before the loss: labels that cannot be read.
    norm = ours.get_base_model().model.norm
    handle = norm.register_forward_hook(fail)
    with pytest.raises(error, match="cut off"):
        ours(**batch)
    handle.remove()
    del batch["labels"]
    assert type(ours(**batch).logits) is torch.Tensor
    assert models_state(ours) == installed


def test_a_loss_function_of_ones_own_gets_ordinary_logits():
    _, ours = pair(dtype=torch.float32)
    seen = []

    def own_loss(logits, labels, vocab_size, **kwargs):
        seen.append(type(logits))
        return logits.logsumexp(-1).mean()

    ours.get_base_model().loss_function = own_loss
    assert ours(**models.batch("llama")).loss.requires_grad
    assert seen == [torch.Tensor]
    assert "own_loss" in logit_free_status(ours)[1]
    assert ours.get_base_model().loss_function is own_loss


def test_hooks_on_the_head_are_called():
    stock, ours = pair(dtype=torch.float32)
    for model in (stock, ours):
        model.get_output_embeddings().register_forward_hook(lambda m, a, out: 2 * out)
    assert "hooks" in logit_free_status(ours)[1]
    batch = models.batch("llama")
    assert torch.equal(ours(**batch).loss, stock(**batch).loss)


def test_status_of_a_model_where_it_is_not_installed():
    assert logit_free_status(base_model())[0] is False
    _, ours = pair()
    assert logit_free_status(ours)[0] is True
