"""What ``peftkit doctor`` expects on each kind of machine."""

import json
from pathlib import Path

import pytest

import peftkit.expectations as module
from peftkit.expectations import expectations

FIGURES = json.loads(Path(module.__file__).with_suffix(".json").read_text())
WHOLE = [f for f in FIGURES["cpu"] if not f["switched_off"]]
TRAINED = [f for f in WHOLE if f["onednn"]]
WITHOUT = {
    native: next(
        f for f in [*WHOLE, *FIGURES["cpu"]] if (f["onednn"], f["native"]) == (False, native)
    )
    for native in (True, False)
}
"""Without oneDNN: of a processor that has none, and with the native passes switched off, too."""


def gpu(name, capability, kind="cuda"):
    return {"name": name, "kind": kind, "memory_bytes": None, "capability": capability}


def on(processor="", architecture="x86_64", gpus=(), onednn=False, native=True, threads=2):
    machine = {"processor": processor, "architecture": architecture, "gpus": list(gpus)}
    return expectations(machine, onednn=onednn, native=native, threads=threads)


def bases(rows):
    return {(row["step_time_basis"], row["memory_basis"]) for row in rows}


def test_the_measured_processor():
    rows = on(TRAINED[0]["machine"], onednn=True, threads=TRAINED[0]["threads"])
    assert bases(rows) == {("measured", "measured")}
    for row, figure in zip(rows, TRAINED, strict=True):
        assert (row["device"], row["why"]) == ("CPU", "")
        for name in ("model", "step_time", "memory", "result"):
            assert row[name] == figure[name]
        assert row["measured_on"] == figure["label"]
        assert TRAINED[0]["machine"] in row["measured_on"]


@pytest.mark.parametrize(
    ("processor", "threads"), [("AMD Ryzen 9 9950X", 2), (TRAINED[0]["machine"], 64)]
)
def test_another_processor_with_onednn_is_predicted(processor, threads):
    rows = on(processor, onednn=True, threads=threads)
    assert bases(rows) == {("predicted", "predicted")}
    assert [row["step_time"] for row in rows] == [f["step_time"] for f in TRAINED]
    assert "was not measured" in rows[0]["why"]


@pytest.mark.parametrize("processor", ["Intel(R) Xeon(R) 6980P", TRAINED[0]["machine"], None])
@pytest.mark.parametrize("native", [True, False])
def test_without_onednn_the_figures_are_those_of_another_processor_without_it(processor, native):
    (row,) = on(processor, native=native)
    assert bases([row]) == {("predicted", "predicted")}
    figure = WITHOUT[native]
    assert (row["step_time"], row["memory"]) == (figure["step_time"], figure["memory"])
    assert row["measured_on"] == figure["label"]
    assert ("off" in row["measured_on"]) == figure["switched_off"] == (not native)


def test_a_measured_processor_without_onednn():
    figure = WITHOUT[True]
    (row,) = on(figure["machine"], threads=figure["threads"])
    assert bases([row]) == {("measured", "measured")}
    assert row["measured_on"] == figure["label"]


@pytest.mark.parametrize(
    "machine",
    [
        {"architecture": "arm64", "native": False},
        {"architecture": "aarch64", "native": True},
        {"architecture": None, "native": True},
        {"architecture": "x86_64", "native": False, "onednn": True},
    ],
)
def test_time_of_machines_unlike_any_measured_is_not_predicted(machine):
    (row,) = on("some processor", **machine)
    assert bases([row]) == {("not measured", "predicted")}
    assert row["step_time"] is None
    assert row["memory"] == WITHOUT[machine["native"]]["memory"]


def test_the_measured_card_by_the_start_of_its_name():
    rows = on(gpus=[gpu("NVIDIA H100 80GB HBM3", "9.0")])[:-1]
    assert bases(rows) == {("measured", "measured")}
    assert {row["device"] for row in rows} == {"NVIDIA H100 80GB HBM3"}
    assert [row["step_time"] for row in rows] == [f["step_time"] for f in FIGURES["gpu"]]
    assert {row["measured_on"] for row in rows} == {"NVIDIA H100 80GB"}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (gpu("NVIDIA H20", "9.0"), ("predicted", "predicted")),
        (gpu("NVIDIA H100 PCIe", "9.0"), ("predicted", "predicted")),
        (gpu("NVIDIA A100-SXM4-40GB", "8.0"), ("not measured", "predicted")),
        (gpu("NVIDIA B200", "10.0"), ("not measured", "predicted")),
        (gpu("Tesla T4", "7.5"), ("not measured", "not measured")),
        (gpu("MI300X", "gfx942", "rocm"), ("not measured", "not measured")),
        (gpu("Apple GPU", None, "mps"), ("not measured", "not measured")),
        (gpu(None, None), ("not measured", "not measured")),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else None,
)
def test_other_cards(card, expected):
    rows = on(gpus=[card])[:-1]
    assert bases(rows) == {expected}
    for row in rows:
        assert row["device"] == (card["name"] or "unknown GPU")
        assert row["why"]
        for name in ("step_time", "memory"):
            assert (row[name] is None) == (row[f"{name}_basis"] == "not measured")


def test_every_device_has_its_rows():
    cards = [gpu("NVIDIA H100 80GB HBM3", "9.0"), gpu("Tesla T4", "7.5")]
    devices = [row["device"] for row in on(gpus=cards)]
    assert list(dict.fromkeys(devices)) == ["NVIDIA H100 80GB HBM3", "Tesla T4", "CPU"]
