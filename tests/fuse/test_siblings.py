"""Linears that share an input: which are grouped, which are not, and that no stale output is used."""

import sys
import threading

import models
import pairs
import pytest
import torch
from fused_pairs import adapt, draw
from peft import LoraConfig, get_peft_model
from torch import nn

from peftkit import accelerate, explain
from peftkit.compatibility.batches import training_batch
from peftkit.compatibility.tiny import tiny_model
from peftkit.fuse.linear import fuse_layer
from peftkit.fuse.mlp import FusedGatedMLP
from peftkit.fuse.siblings import Siblings, calls_on_one_input, group_siblings

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 32


class Attention(nn.Module):
    """Three projections with the given names."""

    def __init__(self, names=("q_proj", "k_proj", "v_proj"), inputs=(WIDTH,) * 3):
        super().__init__()
        for i, (name, size) in enumerate(zip(names, inputs, strict=True)):
            self.add_module(name, nn.Linear(size, 8 * (i + 1)))


def attention(**options):
    """The projections of a stock attention and of a fused copy."""
    return (model.base_model.model[0] for model in adapt(Attention(**options)))


def call(module, x, names):
    return [getattr(module, name)(x) for name in names]


@pytest.fixture
def calls(monkeypatch):
    with pairs.counted(monkeypatch) as counts:
        yield counts


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("query", "key", "value"),
        ("q_lin", "k_lin", "v_lin"),
        ("q", "k", "v"),
    ],
    ids=lambda names: names[0],
)
def test_siblings_with_known_names_are_one_call(names, calls):
    plain, fused = attention(names=names)
    x = draw(2, 5, WIDTH)
    for actual, expected in zip(call(fused, x, names), call(plain, x, names), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert calls == {"lora_qkv": 1, "peft": 3}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [12, 13], ids=["apart", "joined"])
def test_forwards_with_and_without_gradients_give_the_same_bits(tokens, dropout, calls):
    """Reentrant checkpointing needs this. Linears that share no product are computed separately."""
    names = ("q_proj", "k_proj", "v_proj")
    _, fused = (m.base_model.model[0] for m in adapt(Attention(), lora_dropout=dropout))
    fused.train()
    x = draw(1, tokens, WIDTH)
    torch.manual_seed(0)
    expected = call(fused, x, names)
    torch.manual_seed(0)
    with torch.no_grad():
        for actual, one in zip(call(fused, x, names), expected, strict=True):
            assert torch.equal(actual, one)
    apart = tokens == 12 and dropout == 0.0
    assert calls == ({"lora_qkv": 1, "lora_linear": 3} if apart else {"lora_qkv": 2})


@pytest.mark.parametrize("missing", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("as_none", [False, True], ids=["absent", "none"])
def test_modules_with_two_of_the_names_are_grouped(missing, as_none, calls):
    names = [n for n in ("q_proj", "k_proj", "v_proj") if n != missing]
    base = Attention(names, inputs=(WIDTH,) * 2)
    if as_none:
        setattr(base, missing, None)
    plain, fused = (model.base_model.model[0] for model in adapt(base))
    x = draw(2, 5, WIDTH)
    for actual, expected in zip(call(fused, x, names), call(plain, x, names), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert calls == {"lora_qkv": 1, "peft": 2}


def test_siblings_of_different_input_size_and_single_ones_are_not_grouped():
    groups = []
    for options in ({}, {"inputs": (WIDTH, 16, 16)}, {"names": ("q_proj", "b", "c")}):
        plain, _ = adapt(Attention(**options))
        for module in plain.modules():
            fuse_layer(module)
        groups.append(group_siblings(plain))
    assert groups == [1, 0, 0]


def test_cross_attention_shares_keys_and_values(calls):
    """The query gets the decoder's states, keys and values get the encoder's."""
    plain, fused = attention()
    for forward in range(3):
        x, states = draw(2, 5, WIDTH), draw(2, 7, WIDTH)
        for name, source in (("q_proj", x), ("k_proj", states), ("v_proj", states)):
            expected = getattr(plain, name)(source)
            actual = getattr(fused, name)(source)
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        del calls["peft"]
        # Each time the query computes unused keys and values of its own input, because a forward does not change the grouping.
        assert calls == {"lora_qkv": 2 * (forward + 1)}


def test_any_order_and_subset_of_calls_is_exact():
    plain, fused = attention()
    names = ("q_proj", "k_proj", "v_proj")
    generator = torch.Generator().manual_seed(0)
    inputs = [draw(2, 3, WIDTH) for _ in range(2)]
    for pick in torch.randint(0, 6, (80,), generator=generator).tolist():
        name, x = names[pick % 3], inputs[pick // 3]
        expected = getattr(plain, name)(x)
        torch.testing.assert_close(getattr(fused, name)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_input_changed_in_place_is_detected(mode):
    plain, fused = attention()
    with mode():
        x = draw(2, 16, WIDTH)
        fused.q_proj(x)
        x.mul_(2.0)
        torch.testing.assert_close(fused.k_proj(x), plain.k_proj(x), rtol=1e-12, atol=1e-12)


def changes():
    """Changes between the call of the query and that of the key, by name."""

    def optimiser_step(module):
        with torch.no_grad():
            module.k_proj.lora_B["default"].weight.add_(1.0)

    def other_adapter(module):
        module.k_proj.update_layer("two", 2, lora_alpha=9, config=LoraConfig())
        pairs.fill_factors(module, seed=3)
        module.k_proj.set_adapter("two")

    def evaluation(module):
        module.k_proj.eval()

    return {
        "optimiser_step": optimiser_step,
        "other_adapter": other_adapter,
        "scale": lambda module: module.k_proj.set_scale("default", 5.0),
        "disabled": lambda module: module.k_proj.enable_adapters(False),
        "merged": lambda module: module.k_proj.merge(),
        "new_weight": lambda module: setattr(
            module.k_proj.lora_A["default"], "weight", nn.Parameter(torch.ones(4, WIDTH).double())
        ),
        "evaluation": evaluation,
    }


@pytest.mark.parametrize("change", changes())
def test_an_output_from_before_a_change_is_not_used(change):
    plain, fused = (m.base_model.model[0] for m in adapt(Attention(), lora_dropout=0.0))
    x = draw(2, 5, WIDTH)
    fused.q_proj(x)
    for module in (plain, fused):
        changes()[change](module)
    torch.testing.assert_close(fused.k_proj(x), plain.k_proj(x), rtol=1e-12, atol=1e-12)


def test_dropout_switched_off_after_the_query():
    plain, fused = (m.base_model.model[0] for m in adapt(Attention(), lora_dropout=0.5))
    x = draw(2, 5, WIDTH)
    fused.train().q_proj(x)
    torch.testing.assert_close(fused.eval().k_proj(x), plain.eval().k_proj(x))


def test_calls_with_and_without_gradients_do_not_mix():
    _, fused = attention()
    x = draw(2, 16, WIDTH)
    with torch.no_grad():
        fused.q_proj(x)
    assert fused.k_proj(x).requires_grad


def test_no_tensor_is_kept_after_all_outputs_are_used():
    _, fused = attention()
    call(fused, draw(2, 5, WIDTH), ("q_proj", "k_proj", "v_proj"))
    group = fused.q_proj._peftkit_siblings
    assert isinstance(group, Siblings)
    assert group is fused.v_proj._peftkit_siblings
    assert group._thread.pending is None


def test_names_of_every_tiny_model_are_grouped_or_known():
    found = {}
    for name in models.NAMES:
        _, fused = pairs.pair(name)
        groups = {
            id(m._peftkit_siblings) for m in fused.modules() if hasattr(m, "_peftkit_siblings")
        }
        found[name] = (len(groups), sum(isinstance(m, FusedGatedMLP) for m in fused.modules()))
    four = dict.fromkeys(("llama", "qwen3", "gemma3", "mistral"), (2, 2))
    rest = {
        "gpt2": (0, 0),
        "opt": (2, 0),
        "phi3": (0, 2),
        "bert": (2, 0),
        "t5": (6, 0),
        "vit": (2, 0),
    }
    assert found == four | rest


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_groups_exclude_the_query_before_the_first_forward(name):
    """Under checkpointing the recomputation of the first forward must save the same tensors as this forward."""
    import families

    model = accelerate(
        get_peft_model(families.family(name), LoraConfig(r=4, target_modules="all-linear"))
    ).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    groups = {
        n: [
            len(m.__dict__["_peftkit_siblings"].members)
            for m in attention.children()
            if "_peftkit_siblings" in vars(m)
        ]
        for n, attention in model.named_modules()
        if n.endswith(("EncDecAttention", "encoder_attn"))
    }
    assert groups
    assert all(sizes == [2, 2] for sizes in groups.values())


@pytest.mark.parametrize(
    ("architecture", "cls", "names", "expected"),
    [
        ("llama", "LlamaAttention", ("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj")),
        ("bert", "BertSelfAttention", ("query", "key", "value"), ("query", "key", "value")),
        ("luke", "LukeSelfAttention", ("query", "key", "value"), ("key", "value", "query")),
        ("t5", "T5Attention", ("q", "k", "v"), ("q", "k", "v")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_source_shows_which_linears_share_an_input(architecture, cls, names, expected):
    module = __import__(
        f"transformers.models.{architecture}.modeling_{architecture}", fromlist=[cls]
    )
    assert calls_on_one_input(getattr(module, cls), names) == expected


def test_linears_are_grouped_in_the_order_of_their_calls(calls):
    class KeysFirst(Attention):
        def forward(self, x, y=None):
            states = x if y is None else y
            key, value = self.k_proj(states), self.v_proj(states)
            return self.q_proj(x), key, value

    names = ("q_proj", "k_proj", "v_proj")
    assert calls_on_one_input(KeysFirst, names) == ("k_proj", "v_proj", "q_proj")
    plain, fused = (model.base_model.model[0] for model in adapt(KeysFirst()))
    x = draw(2, 5, WIDTH)
    for actual, expected in zip(fused(x), plain(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert calls["lora_qkv"] == 1


_QUERIES = ("query", "key", "value", "q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("name", ["convbert", "luke", "segformer"])
def test_checkpointing_of_models_whose_queries_have_their_own_input(name):
    base = tiny_model(name)
    batch = training_batch(base)
    targets = [
        n for n, m in base.named_modules() if n.endswith(_QUERIES) and isinstance(m, nn.Linear)
    ]
    model = accelerate(get_peft_model(base, LoraConfig(r=4, target_modules=targets))).train()
    expected = run(model, batch)
    assert len(expected) > 2
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for _ in range(2):
        actual = run(model, batch)
        assert actual.keys() == expected.keys()
        for key, value in actual.items():
            torch.testing.assert_close(value, expected[key])


def run(model, batch):
    """The loss and the gradients of a step. Some parameters of these models get no gradient."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads


def test_another_thread_between_two_calls_does_not_interfere():
    _, fused = attention()
    mine, other = draw(2, 5, WIDTH), draw(2, 5, WIDTH)
    names = ("q_proj", "k_proj", "v_proj")
    expected = [y.detach().clone() for y in call(fused, mine, names)]
    found = []
    first = fused.q_proj(mine)
    thread = threading.Thread(target=lambda: found.extend(call(fused, other, names)))
    thread.start()
    thread.join()
    for actual, one in zip((first, *call(fused, mine, names[1:])), expected, strict=True):
        assert torch.equal(actual, one)
    for actual, one in zip(found, call(fused, other, names), strict=True):
        assert torch.equal(actual, one)


def test_two_threads_that_run_one_model_get_their_own_results(monkeypatch):
    _, fused = attention()
    names = ("q_proj", "k_proj", "v_proj")
    inputs = [draw(4, WIDTH) for _ in range(2)]
    expected = [[y.detach().clone() for y in call(fused, x, names)] for x in inputs]
    interval, wrong = sys.getswitchinterval(), []

    def run(which):
        for _ in range(300):
            results = call(fused, inputs[which], names)
            wrong.extend(
                y for y, e in zip(results, expected[which], strict=True) if not torch.equal(y, e)
            )

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert len(fused.q_proj._peftkit_siblings.members) == 3


@pytest.mark.parametrize("replaced", ["q_proj", "k_proj", "v_proj"])
def test_the_report_says_what_runs_after_a_sibling_was_replaced(replaced, calls):
    names = ["q_proj", "k_proj", "v_proj"]
    model = adapt(Attention())[1]
    fused = model.base_model.model[0]
    setattr(fused, replaced, nn.Linear(WIDTH, 8).double())
    call(fused, draw(2, 5, WIDTH), names)
    rows = {row.name: row for row in explain(model).layers if row.method == "shared input"}
    row = rows["base_model.model.0." + "+".join(name for name in names if name != replaced)]
    assert (row.path == "fused:torch") == (calls["lora_qkv"] == 1)
    assert ("replaced" in row.reason) == (replaced == "q_proj")
