"""Every method under ``torch.compile``: as few graphs as the base model, and the numbers of the eager model."""

import methods
import models
import pairs
import pytest
import torch
from torch._dynamo.utils import counters

CASES = (
    ("llama", "prefix"),
    ("llama", "all three"),
    ("bert", "pfeiffer"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("llama", "bottleneck"),
            ("bert", "LoRA and parallel"),
            ("t5", "prefix and bottleneck"),
        )
    ),
)


@pytest.fixture(autouse=True)
def _fresh(one_thread):
    """Graphs and counters of other tests are not these."""
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize(("name", "method"), CASES)
def test_one_graph_as_near_to_float64_as_the_eager_model(name, method):
    model = methods.trained(methods.wrapped(method, name)).train()
    truth = pairs.in_float64(model)
    loss_of = pairs.loss_from_logits if name in models.CAUSAL_NAMES else None
    compiled, runs = torch.compile(model, backend="aot_eager", fullgraph=True), []
    for seed in range(4):
        batch = models.batch(name, seed)
        # first, because BERT notes the kind of its labels in the first forward
        eager, exact = pairs.step(model, batch), pairs.step(truth, batch, loss_of)
        values = pairs.step(compiled, batch)
        one = {key.removeprefix("_orig_mod."): value for key, value in values.items()}
        runs.append((one, eager, exact))
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] == 1
    pairs.assert_near_enough(runs)
