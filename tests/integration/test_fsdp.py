"""Two processes under torchrun (gloo): a wrapped model that a user's own loop divides with FSDP2, adapters included."""

import pytest
import torch
from integration.children import sharded
from integration.support import ROOT, two_processes

CHILD = ROOT / "tests" / "integration" / "children" / "sharded.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    return two_processes(CHILD, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", sharded.CASES)
def test_losses_and_gradients_are_those_of_the_whole_stock_model(ranks, name):
    stock, exact = (sharded.adapted(name) for _ in range(2))
    exact = exact.double()
    for model in (stock, exact):
        losses = [model(**sharded.row(name, rank)).loss for rank in range(2)]
        (sum(losses) / 2).backward()
        if model is stock:
            found = torch.stack([result[name]["loss"] for result in ranks])
            torch.testing.assert_close(found, torch.stack(losses).detach(), rtol=1e-5, atol=0)
    grads, stock_grads, truth = (
        ranks[0][name]["grads"],
        *({n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (stock, exact)),
    )
    assert grads.keys() == truth.keys()
    rival = max((stock_grads[n] - truth[n]).norm() / truth[n].norm() for n in truth)
    for key, grad in grads.items():
        assert (grad - truth[key]).norm() <= (3 * rival + 1e-6) * truth[key].norm(), key
