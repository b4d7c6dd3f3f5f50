"""Stock PEFT and fused models with the same weights, the results of one step of each, and the ops that ran."""

import copy
from collections import Counter
from contextlib import contextmanager

import models
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear

from peftkit import accelerate
from peftkit.find.targets import all_linear
from peftkit_kernels.core.schedule import Schedule
from peftkit_kernels.ops.lora_linear.schedule import Linears


def stock(name, dtype=torch.float32, model_dropout=0.0, **config):
    """Tiny model ``name`` with PEFT's LoRA on every linear layer; no factor is zero."""
    return adapted(models.tiny(name, dtype=dtype, dropout=model_dropout), **config)


def adapted(model, **config):
    """A model with PEFT's LoRA, as ``stock``."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": all_linear(model).names} | config
    model = get_peft_model(model, LoraConfig(**settings))
    fill_factors(model)
    return model.train()


def fill_factors(model, seed=0):
    """Give every LoRA parameter a seeded value, so that no zero hides an error."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name:
                parameter.data.mul_(1 + 0.2 * values)
            else:
                parameter.data.copy_(values * 0.2)


def pair(name, dtype=torch.float32, logit_free=True, **config):
    """A stock model and a fused copy."""
    plain = stock(name, dtype, **config)
    return plain, accelerate(copy.deepcopy(plain), logit_free=logit_free)


def inputs(name, dtype=torch.float32, seed=0):
    """A batch with labels, its pixels in ``dtype``."""
    batch = models.batch(name, seed)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def step(model, batch, loss_of=None):
    """The loss and every gradient by name, of one forward and backward."""
    model.zero_grad()
    loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach()} | grads


def loss_from_logits(model, batch):
    """A causal model's loss in the dtype of its logits. Transformers' own loss rounds them to float32."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def in_float64(model):
    """The same model with the same weights, in float64."""
    return copy.deepcopy(model).double()


def assert_equal(actual, expected):
    """Assert that names and bits are equal."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


def assert_close(actual, expected, rtol):
    """Assert that every value is within ``rtol`` of the largest element of the expected one, which must not be zero."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        size = expected[name].abs().max()
        assert size > 0, f"{name} is zero, so a missing gradient would pass"
        error = (value - expected[name]).abs().max() / size
        assert error <= rtol, f"{name}: {error:.3g} of its largest element off"


def assert_as_good(plain, fused, name, dtype=torch.float32):
    """Assert that over four batches of ``name`` ``fused`` is about as close to float64 as ``plain``; see ``assert_near_enough``.

    If ``dtype`` is a 16-bit dtype other than that of the models' weights, the models run under autocast.
    """
    truth, runs = in_float64(plain), []
    loss_of = loss_from_logits if name in models.CAUSAL_NAMES else None
    storage = next(p.dtype for n, p in plain.named_parameters() if "lora_" not in n)
    for seed in range(4):
        exact = step(truth, inputs(name, torch.float64, seed), loss_of)
        with torch.autocast("cpu", dtype=dtype, enabled=storage != dtype):
            computed = [step(model, inputs(name, storage, seed)) for model in (fused, plain)]
        runs.append((*computed, exact))
    assert_near_enough(runs, dtype)


def assert_near_enough(runs, dtype=torch.float32, factor=2):
    """Assert that the error over all runs is at most ``factor`` times that of plain torch.

    A single value has few correlated numbers, so the error of plain torch may be small by chance. Its error may be four times that
    of plain torch plus a rounding to ``dtype``; in float32 that of a vector, such as the gradient of a bias, plus one for each of the
    24 rows over which it is a sum, because the rows cancel and their roundings do not. The error over all is that of the others.

    Args:
        runs: For each batch, the results of ``step`` for the fused model, the plain model and the model in float64.
        dtype: The dtype of the computation.
        factor: How many times the error of plain torch is allowed.
    """
    squares = {}
    for *computed, exact in runs:
        for key, value in exact.items():
            assert computed[0][key].dtype == computed[1][key].dtype, key
            off = [(values[key].double() - value).norm() / value.norm() for values in computed]
            squares.setdefault(key, []).append(torch.stack(off).square())
    errors = {key: torch.stack(values).mean(0).sqrt() for key, values in squares.items()}
    for key, (error, allowed) in errors.items():
        roundings = 24 if runs[0][-1][key].dim() == 1 and dtype is torch.float32 else 1
        limit = 4 * allowed + roundings * torch.finfo(dtype).eps
        assert limit < 1, f"{key}: plain torch is {allowed:.3g} off; a missing gradient would pass"
        assert error <= limit, f"{key}: {error:.3g} off, plain torch {allowed:.3g}"
    whole = [errors[key] for key, value in runs[0][-1].items() if value.dim() != 1]
    error, allowed = torch.stack(whole).square().mean(0).sqrt()
    assert error <= factor * allowed, f"{error:.3g} off in all, plain torch {allowed:.3g}"


@contextmanager
def counted(monkeypatch):
    """Count the calls of every op, and of PEFT's own LoRA forward."""
    calls = Counter()

    def counting(key, function):
        def call(*args, **kwargs):
            calls[key] += 1
            return function(*args, **kwargs)

        return call

    run = Schedule.__call__

    def count_and_run(schedule, backend, call):
        if schedule.name == "linear_cross_entropy":  # the loss, of which a step has one
            return run(schedule, backend, call)
        several = isinstance(call, Linears) and len(call.linears) > 1
        # a backward that computes an activation again has no gradients of its own
        is_backward = torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()
        if not is_backward:
            calls["lora_qkv" if several else schedule.name] += 1
        return run(schedule, backend, call)

    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "__call__", count_and_run)
        # PEFT's forward calls this first. Replacing the forward itself would be detected.
        check = Linear._check_forward_args
        patch.setattr(Linear, "_check_forward_args", counting("peft", check))
        yield calls
