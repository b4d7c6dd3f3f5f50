"""Average precision of boxes against values worked out by hand."""

import pytest

from peftkit import ContractError
from peftkit.finetune.average_precision import mean_average_precision


def precision(wanted, *found, classes=2):
    most = max(map(len, found))
    rows = [[*image, *[[-100] * 6] * (most - len(image))] for image in found]
    return mean_average_precision(wanted, rows, classes)


def test_average_precision_by_hand():
    first, second = [0, 0, 0, 0, 10, 10], [0, 0, 20, 20, 30, 30]
    right, other = [0, 0, 0, 10, 10], [0, 20, 20, 30, 30]
    # Recall 1/2 with precision 1, recall 1 with 2/3: 51 and 50 of COCO's 101 places.
    found = [[0.9, *right], [0.8, 0, 50, 50, 60, 60], [0.7, *other]]
    expected = pytest.approx((51 + 50 * 2 / 3) / 101)
    assert precision([[first, second]], found) == {"map": expected, "map_50": expected}
    # The same boxes in two images; the order of the scores is over all images.
    assert precision([[first], [second]], found[:2], found[2:])["map"] == expected
    # An IoU of 0.62 is right at three of ten thresholds.
    assert precision([[first]], [[0.5, 0, 0, 0, 10, 6.2]]) == {
        "map": pytest.approx(0.3),
        "map_50": pytest.approx(1.0),
    }
    # A second box on the same object is wrong, but comes after recall 1.
    assert precision([[first]], [[0.9, *right], [0.8, *right]])["map"] == pytest.approx(1.0)
    # The second class is missed; a third class has no object and does not count.
    both = [[first, [1, 0, 40, 0, 50, 10]]]
    assert precision(both, [[0.9, *right]], classes=3)["map"] == pytest.approx(0.5)
    # The right place with another class is wrong.
    assert precision([[first]], [[0.9, 1, 0, 0, 10, 10]])["map"] == 0
    # A box in a crowd is neither right nor wrong.
    crowd = [[first, [0, 1, 15, 15, 35, 35]]]
    assert precision(crowd, [[0.9, *other], [0.8, *right]])["map"] == pytest.approx(1.0)
    assert precision([[first], []], [[0.8, *right]], [[0.9, *right]])["map"] == pytest.approx(0.5)
    with pytest.raises(ContractError, match="no object"):
        precision([[[0, 1, 0, 0, 5, 5]]], [[0.9, *right]])
    with pytest.raises(ContractError, match="not finite"):
        precision([[first]], [[float("nan"), *right]])
