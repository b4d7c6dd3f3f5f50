"""Logits of a logit-free model: every reader gets ordinary logits."""

import copy
import io
import pickle

import models
import numpy as np
import pytest
import torch
from accelerate.utils import convert_to_fp32
from causal import pair
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peftkit.fuse.loss import LazyLogits, install_logit_free
from peftkit_kernels.ops.linear_cross_entropy import RowLoss


def model_pair(dtype=torch.float64):
    """Two copies of a tiny Llama with LoRA on a layer and on the head. The second copy is logit-free."""
    return pair(dtype=dtype, target_modules=["q_proj", "lm_head"])


@pytest.fixture
def logits():
    """``(ordinary, lazy)`` logits with the same values."""
    stock, ours = model_pair()
    lazy = ours(**models.batch("llama")).logits
    assert type(lazy) is LazyLogits
    return stock(**models.batch("llama")).logits, lazy


def saved_and_loaded(tensor):
    file = io.BytesIO()
    torch.save(tensor.detach(), file)
    file.seek(0)
    return torch.load(file)


READS = {
    "detach": lambda z: z.detach(),
    "index": lambda z: z[:, -1, :].detach(),
    "boolean index": lambda z: z[torch.ones(2, 12, dtype=torch.bool)].detach(),
    "argmax": lambda z: z.argmax(-1),
    "topk": lambda z: torch.topk(z, 3).indices,
    "float": lambda z: z.float().detach(),
    "half": lambda z: z.half().detach(),
    "to": lambda z: z.to("cpu", torch.float16).detach(),
    "clone": lambda z: z.clone().detach(),
    "data": lambda z: z.data,
    "mT": lambda z: z.mT.detach(),
    "add": lambda z: (1 + z).detach(),
    "compare": lambda z: z > 0,
    "log_softmax": lambda z: F.log_softmax(z, -1).detach(),
    "cat": lambda z: torch.cat([z, z]).detach(),
    "pad": lambda z: F.pad(z, (0, 0, 0, 3), value=-100).detach(),
    "iterate": lambda z: [row.detach() for row in z][1],
    "unbind": lambda z: z.unbind(1)[3].detach(),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "asarray": lambda z: torch.from_numpy(np.asarray(z.detach().cpu())),
    "tolist": lambda z: torch.tensor(z.tolist(), dtype=z.dtype),
    "item": lambda z: torch.tensor(z[0, 0, 0].item(), dtype=z.dtype),
    "view": lambda z: z.view(-1, z.shape[-1]).detach(),
    "save": saved_and_loaded,
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "in place": lambda z: z.detach().clone().masked_fill_(z > 0, 0),
}


@pytest.mark.parametrize("read", READS)
def test_reading(read, logits):
    ordinary, lazy = (READS[read](z) for z in logits)
    assert type(lazy) is torch.Tensor
    assert lazy.dtype == ordinary.dtype
    assert torch.equal(lazy, ordinary)


def test_repr_shows_the_numbers(logits):
    ordinary, lazy = logits
    assert repr(lazy.detach()) == repr(ordinary.detach())
    assert repr(lazy).splitlines()[0] == repr(ordinary).splitlines()[0]


def test_saving_without_detaching_stores_an_ordinary_tensor():
    _, ours = model_pair()
    with torch.no_grad():
        lazy = ours(**models.batch("llama")).logits
    file = io.BytesIO()
    torch.save({"logits": lazy}, file)
    file.seek(0)
    assert type(torch.load(file)["logits"]) is torch.Tensor
    assert type(copy.deepcopy(lazy)) is torch.Tensor
    assert torch.equal(copy.deepcopy(lazy), lazy)


def test_metadata_is_known_without_computing(logits):
    ordinary, lazy = logits
    for z in (lazy, ordinary):
        assert z.shape == z.size() == (2, 12, models.VOCAB_SIZE)
        assert (z.dim(), z.ndim, len(z), z.numel()) == (3, 3, 2, 24 * models.VOCAB_SIZE)
        assert z.dtype == torch.float64
        assert z.device.type == "cpu"
        assert z.requires_grad
        assert z.grad_fn is not None
        assert not z.is_leaf
        assert z.is_floating_point()
        assert z.is_contiguous()
        assert z.stride() == ordinary.stride()
    assert lazy._real is None


def test_the_values_are_computed_once(logits):
    _, lazy = logits
    assert lazy[0, 0].untyped_storage().data_ptr() == lazy[1, 1].untyped_storage().data_ptr()


def test_a_change_in_place_is_kept():
    _, ours = model_pair()
    with torch.no_grad():
        lazy = ours(**models.batch("llama")).logits
        lazy[..., 3] = -7.0
    assert (lazy[..., 3] == -7).all()


@pytest.mark.parametrize("how", ["functions", "autograd function", "both losses", "backward"])
def test_gradients_of_a_custom_loss(how):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return (z * z).sum()

        @staticmethod
        def backward(ctx, grad):
            (z,) = ctx.saved_tensors
            return 2 * grad * z

    results = []
    for model in model_pair():
        output = model(**models.batch("llama"))
        if how == "functions":
            F.log_softmax(output.logits, -1)[..., 5].mean().backward()
        elif how == "autograd function":
            Square.apply(output.logits).backward()
        elif how == "both losses":
            (output.loss.double() + output.logits.square().sum()).backward()
        else:
            output.logits.backward(torch.ones(2, 12, models.VOCAB_SIZE, dtype=torch.float64))
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, actual = results
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert grad.any(), name
        # The models' norms always compute in float32.
        bound = 8 * torch.finfo(torch.float32).eps * expected[name].abs().max()
        assert (grad - expected[name]).abs().max() <= bound, name


def test_hooks_and_retained_gradients(logits):
    seen = []
    for z in logits:
        z.retain_grad()
        z.register_hook(seen.append)
    assert logits[1]._real is None
    for z in logits:
        z.square().sum().backward()
    ordinary, lazy = logits
    assert torch.equal(lazy.grad, ordinary.grad)
    assert torch.equal(seen[0], seen[1])


def test_second_derivatives_of_a_custom_loss():
    results = []
    for model in model_pair():
        output = model(**models.batch("llama"))
        (grad,) = torch.autograd.grad(output.logits.exp().sum(), output.logits, create_graph=True)
        parameter = model.get_output_embeddings().lora_B["default"].weight
        (first,) = torch.autograd.grad(grad.log().square().sum(), parameter, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), parameter)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode):
    stock, ours = model_pair(torch.float32)
    stock.eval()
    ours.eval()
    with mode():
        expected, output = stock(**models.batch("llama")), ours(**models.batch("llama"))
    assert type(output.logits) is LazyLogits
    assert not output.loss.requires_grad
    assert not output.logits.requires_grad
    torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits_with_float32_adapters(dtype):
    """The same bits as PEFT's own layer gives, with and without a cast to float32 first as in accelerate."""
    stock, ours = model_pair(dtype)
    expected, output = stock(**models.batch("llama")), ours(**models.batch("llama"))
    wide = convert_to_fp32(dict(output))["logits"]
    assert type(wide) is LazyLogits
    assert torch.equal(wide, expected.logits.float())
    assert output.logits.dtype == dtype
    assert torch.equal(output.logits, expected.logits)


def test_first_read_without_grad_keeps_the_graph(logits):
    _, lazy = logits
    with torch.no_grad():
        assert lazy.sum().item() != 0
    assert lazy.sum().requires_grad


def test_reading_after_the_head_has_changed_raises():
    _, ours = model_pair()
    output = ours(**models.batch("llama"))
    output.loss.backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        output.logits.argmax(-1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (lambda z: z, RowLoss()),
        (lambda z: z / 3.0, RowLoss(logit_scale=1 / 3)),
        (lambda z: 0.25 * z.contiguous(), RowLoss(logit_scale=0.25)),
        (lambda z: torch.tanh(z / 49.0) * 49.0, RowLoss(softcap=49.0)),
        (lambda z: (z.float() / 30).tanh().mul(30), RowLoss(softcap=30.0)),
        (lambda z: 5 * torch.tanh(z * 2), RowLoss(logit_scale=10.0, softcap=5.0)),
        (lambda z: torch.tanh(z), RowLoss(softcap=1.0)),
        (lambda z: torch.tanh(torch.tanh(z)), None),
        (lambda z: torch.tanh(z) * -1.0, None),
    ],
    ids=["none", "div", "mul", "softcap", "float", "both", "tanh", "tanh twice", "negative cap"],
)
def test_recorded_steps(steps, expected):
    stock, ours = model_pair(torch.float32)
    ordinary, lazy = (steps(m(**models.batch("llama")).logits) for m in (stock, ours))
    assert type(lazy) is LazyLogits
    assert lazy._real is None
    assert lazy.dtype == ordinary.dtype
    assert lazy.row_loss() == expected
    assert torch.equal(lazy, ordinary)
    assert lazy.row_loss() is None


@pytest.mark.parametrize(
    "step",
    [
        lambda z: z + 1,
        lambda z: z * 0.0,
        lambda z: z * torch.tensor(2.0),
        lambda z: z.clamp(-1, 1),
        lambda z: 1 / z,
        lambda z: z.half(),
    ],
)
def test_other_steps_are_run(step):
    stock, ours = model_pair(torch.float32)
    ordinary, result = (step(m(**models.batch("llama")).logits) for m in (stock, ours))
    assert type(result) is torch.Tensor
    assert torch.equal(result, ordinary)


class MaskedLlama(LlamaForCausalLM):
    """Forbids a token by writing into its logits before the loss."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        logits[..., 7] = -1e4
        return self.loss_function(logits, labels, self.config.vocab_size), logits


def test_a_model_that_writes_into_its_logits():
    batch = models.batch("llama")
    batch["labels"].masked_fill_(batch["labels"] == 7, -100)
    results = []
    for install in (False, True):
        model = models.tiny("llama")
        model.__class__ = MaskedLlama
        if install:
            assert install_logit_free(model) is None
        loss, logits = model(**batch)
        assert (logits[..., 7] == -1e4).all()
        loss.backward()
        results.append((loss, model.lm_head.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1])


class _Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {key: value[0] for key, value in models.batch("llama", seed=i).items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_with_metrics_and_label_smoothing(smoothing, tmp_path, monkeypatch):
    """Three steps with accumulation, then evaluation with ``compute_metrics``, with and without peftkit."""
    results, reads = [], []
    values = LazyLogits._values
    monkeypatch.setattr(LazyLogits, "_values", lambda z: reads.append(z.shape) or values(z))
    for name, model in zip(("stock", "ours"), model_pair(torch.float32), strict=True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            label_smoothing_factor=smoothing,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=_Batches(),
            eval_dataset=_Batches(),
            compute_metrics=lambda p: {
                "hits": float((p.predictions.argmax(-1) == p.label_ids).mean()),
                "size": float(np.abs(p.predictions).mean()),
            },
        )
        trainer.train()
        assert not reads, "training formed the logits"
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        metrics = trainer.evaluate()
        results.append((losses, [metrics[f"eval_{k}"] for k in ("loss", "hits", "size")]))
    (stock_losses, stock_metrics), (losses, metrics) = results
    assert len(losses) == 3
    # The label smoother of Trainer removes the labels, so its evaluation does not use peftkit's loss either.
    assert len(reads) == (0 if smoothing else 3)
    assert losses == pytest.approx(stock_losses, rel=1e-5)
    assert metrics == pytest.approx(stock_metrics, rel=1e-5)
