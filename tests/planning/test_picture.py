"""The picture of a plan: every byte of the peak is in the bar, the card's line is its memory, and the page says whether it fits."""

import re

import pytest
from planning import cases

from peftkit import ContractError, plan
from peftkit.planning import picture
from peftkit.planning.cards import CARDS
from peftkit.planning.result import size_text


@pytest.fixture(scope="module")
def planned():
    return plan(cases.llama(4), device="T4", batch_size=2, seq_len=64)


def test_the_bar_holds_every_byte_in_the_order_of_a_step(planned):
    chart = planned.chart()
    assert sum(part.value for part in chart.parts) == planned.reserved_bytes
    names = [part.label for part in chart.parts]
    assert names[0] == "frozen weights"
    assert names.index("logits and loss") > names.index("activations: MLP")
    assert names[-1] in ("space of the allocator", "other", "workspaces of cuBLAS")
    (mark,) = chart.marks
    assert (mark.label, mark.value) == ("T4", CARDS["T4"].memory_bytes)


def test_the_line_of_the_cpu_is_the_memory_that_this_process_may_use(monkeypatch):
    machine = {"memory_bytes": 8 * 2**30, "memory_limit_bytes": 2**30}
    monkeypatch.setattr(picture, "describe_machine", lambda: machine)
    on_cpu = plan(cases.llama(1), device="cpu", seq_len=16)
    assert picture.device_memory(on_cpu) == ("this machine", 2**30)
    machine["memory_limit_bytes"] = None
    assert picture.device_memory(on_cpu) == ("this machine", 8 * 2**30)


def test_the_page_has_the_numbers_and_the_verdict(planned, tmp_path, monkeypatch):
    planned.to_html(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert size_text(planned.reserved_bytes) in text
    assert ">fits<" in text
    assert all(f"<td>{name}</td>" in text for name, _ in planned.rows())
    assert not re.search(r"\b(src|href)=|https?://", text)
    small = {**CARDS, "T4": picture.CARDS["T4"].__class__("T4", 2**20, 1, 1, "cuda:75", 1, "")}
    monkeypatch.setattr(picture, "CARDS", small)
    assert ">does NOT fit<" in picture.to_page(planned)


def test_pictures_by_the_name_of_the_file(planned, tmp_path):
    planned.to_image(tmp_path / "plan.svg")
    assert "T4: 14.90 GiB" in (tmp_path / "plan.svg").read_text()
    pytest.importorskip("matplotlib")
    planned.to_image(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ContractError, match=r"plan\.gif has no known kind of picture"):
        planned.to_image(tmp_path / "plan.gif")
