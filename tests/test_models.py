"""The tiny models themselves: a test that uses them may rely on this."""

import models
import pytest
import torch


@pytest.mark.parametrize("name", models.NAMES)
def test_loss_reaches_every_parameter(name):
    model = models.tiny(name)
    loss = model(**models.batch(name)).loss
    loss.backward()
    assert torch.isfinite(loss)
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None]
    assert without_gradient == []


@pytest.mark.parametrize("name", models.NAMES)
def test_same_model_and_batch_each_time(name):
    first, second = models.tiny(name).state_dict(), models.tiny(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    one, two = models.batch(name), models.batch(name)
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = models.batch(name, seed=1)
    assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", models.NAMES)
def test_dropout_is_off_unless_asked_for(name):
    inputs = models.batch(name)
    model = models.tiny(name)
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)
    noisy = models.tiny(name, dropout=0.5)
    assert not torch.equal(noisy(**inputs).loss, noisy(**inputs).loss)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name='lama' is not a tiny model"):
        models.tiny("lama")
