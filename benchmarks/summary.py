"""The measured steps in brief: the first table of the README, and the figures that ``peftkit doctor`` shows.

Both are computed from the results in ``benchmarks/results/`` and contain no other figure.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any, NamedTuple

import records
from cases import CASES, PARTS
from instructions import ISA
from report import RESULTS, instruction_set, load, machine
from steps import Training, best_run

CPU_CASE = "smollm2"
OLDER_CPU = "quantised-smollm2-amd-epyc"
"""The result of another processor on which peftkit multiplies with oneDNN."""

GPU_RESULT = "gpu-h100"
GPU_MODEL = "8 layers of Llama-3.1-8B"
"""The case and the model of the README's table: those that were measured with the most rivals."""

MODELS = {"smollm2": "SmolLM2-135M", "llama-1b-cut": "4 layers of Llama-3.2-1B"}
CAPABILITIES = {"NVIDIA H100 80GB": "9.0"}
"""The compute capability of cards whose result file does not name it."""

RIVALS = {"PEFT": ("peft", "PEFT"), "Unsloth": ("unsloth", "Unsloth"), "full": ("full", "full")}
"""Rivals by their name in the table: the provider in a CPU result, and the start of the provider's name in a GPU result."""

_ROWS = {
    "peftkit lora": "peftkit",
    "PEFT lora": "peft",
    "transformers full": "full",
    "Unsloth lora": "unsloth",
}
"""Rows of the suite and the providers of ``training`` that they are."""

_NO_CPU = "Unsloth was not run on a CPU"


class Step(NamedTuple):
    """One provider's step: the median seconds, and the bytes by which memory grows over the loaded model."""

    seconds: float
    growth: float


def table() -> str:
    """The README's table: each CPU and a GPU, each against every rival, and the lines that say what was measured."""
    measured = cpu_measurements(CPU_CASE)
    lines = ["| | against | step time | memory that a step adds |", "|---|---|---|---|"]
    known = {rival for cpu in measured for rival in cpu_steps(cpu.result)}
    for cpu in measured:
        name = f"CPU: {_short(cpu.result)}"
        for rival, row in _rows(name, cpu_steps(cpu.result), cpu.reasons).items():
            # that a rival was not measured is said if no other CPU has it either
            if rival in cpu_steps(cpu.result) or rival not in known:
                lines.append(row)
    lines += _rows("GPU", gpu_steps(load(GPU_RESULT)), _reasons(load(GPU_RESULT))).values()
    return "\n".join([*lines, "", _conditions(measured), "", _processors()])


class Measurement(NamedTuple):
    """What a CPU case is shown with.

    Attributes:
        result: In the shape of ``training-<case>.json``.
        reasons: Why rivals were not measured.
        file: The file in ``benchmarks/results/``.
        command: The command that measures it again.
        is_limited: Whether instructions that the processor has were switched off.
    """

    result: dict[str, Any]
    reasons: dict[str, str]
    file: str
    command: str
    is_limited: bool = False


def cpu_measurements(case: str) -> list[Measurement]:
    """The result of ``training``, and the suite's rows of a case where it has measured peftkit and PEFT: with all instructions, with AVX2."""
    name = f"training-{case}"
    trained = Measurement(load(name), {"Unsloth": _NO_CPU}, f"{name}.json", "make bench")
    rows = records.stored()
    found = [_of_suite(case, [row for row in rows if row["isa"] == isa]) for isa in ISA]
    return [trained, *filter(None, found)]


def _of_suite(case: str, rows: list[dict[str, Any]]) -> Measurement | None:
    """The rows of the processor that was measured last, at the case's own sizes."""
    sizes = {"batch": CASES[case].batch_size, "length": CASES[case].sequence_length, "rank": 16}
    wanted = {"suite": "methods", "case": case, "adapters": 1, **sizes}
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        is_plain = not row["checkpointing"] and row["environment"].get("gpu") is None
        if is_plain and row["provider"] in _ROWS and wanted.items() <= row.items():
            devices.setdefault(row["environment"]["device"], {})[row["provider"]] = row
    complete = [
        found
        for found in devices.values()
        if all(found.get(f"{name} lora", {}).get("status") == "ok" for name in ("peftkit", "PEFT"))
    ]
    if not complete:
        return None
    found = max(complete, key=lambda rows: rows["peftkit lora"]["environment"]["date"])
    own = found["peftkit lora"]
    where = own["environment"]
    environment = {
        "cpu": where["device"],
        "processor": where["processor"],
        "threads": where["threads"],
        "instructions": where["isa"],
        "products": where["products"],
    }
    measured = {_ROWS[name]: [row] for name, row in found.items() if row["status"] == "ok"}
    reasons = {
        name.partition(" ")[0]: f"{row['status']}: {row['reason']}"
        for name, row in found.items()
        if row["status"] != "ok"
    }
    reasons["full"] = reasons.pop("transformers", "the result has no such run")
    file = records.path_of(where["device"]).name
    limit = "" if own["isa"] == "native" else f" --isa {own['isa']}"
    command = f'make bench ARGS="methods --case {case}{limit}"'
    result = {"environment": environment, "runs": measured}
    return Measurement(result, reasons, file, command, own["isa"] != "native")


def _short(result: dict[str, Any]) -> str:
    """The processor and its instructions, for a cell."""
    name = re.sub(r"\(\w+\)|\bProcessor\b|\(family.*", "", result["environment"]["cpu"])
    isa = instruction_set(result["environment"]) or ("AVX-512" if chose_onednn(result) else "")
    return ", ".join(filter(None, [" ".join(name.split()), isa]))


def cpu_steps(result: dict[str, Any]) -> dict[str, Step]:
    """The steps of a CPU result: peftkit's under the empty name, and those of the rivals that were measured."""
    found = {"": "peftkit", **{rival: names[0] for rival, names in RIVALS.items()}}
    best = {name: best_run(result["runs"][p]) for name, p in found.items() if p in result["runs"]}
    return {name: Step(run["step_seconds"], run["peak_bytes"]) for name, run in best.items()}


def gpu_steps(result: dict[str, Any], model: str = GPU_MODEL) -> dict[str, Step]:
    """As ``cpu_steps``, for one model of a GPU result, at the first of its batch sizes."""
    found: dict[str, Step] = {}
    rows = [row for row in result["steps"] if row["model"] == model]
    rows = [row for row in rows if gpu_model(row) == gpu_model(rows[0])]
    for name, start in {"": "peftkit", **{k: v[1] for k, v in RIVALS.items()}}.items():
        for row in rows:
            # a provider with an option, such as "PEFT, checkpointed" or "PEFT DoRA", is not the rival
            if re.fullmatch(rf"{start}( [\d.]+)?", row["provider"]):
                found.setdefault(name, Step(row["step_s"], row["growth_gib"] * 2**30))
    return found


def _rows(device: str, steps: dict[str, Step], reasons: dict[str, str]) -> dict[str, str]:
    """A row of the table for each rival."""
    rows, own = {}, steps[""]
    for rival in RIVALS:
        name = "full fine-tuning" if rival == "full" else rival
        if rival not in steps:
            why = reasons.get(rival, "the result has no such run")
            rows[rival] = f"| {device} | {name} | not measured: {why} | not measured |"
            continue
        other = steps[rival]
        time = f"{own.seconds / other.seconds:.2f} x ({_seconds(own)} : {_seconds(other)})"
        memory = f"{own.growth / other.growth:.2f} x ({_growth(own)} : {_growth(other)})"
        rows[rival] = f"| {device} | {name} | {time} | {memory} |"
    return rows


def _seconds(step: Step) -> str:
    return f"{step.seconds:.2f} s" if step.seconds >= 1 else f"{1e3 * step.seconds:.0f} ms"


def _growth(step: Step) -> str:
    gib = step.growth / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.0f} MiB"


def _reasons(result: dict[str, Any]) -> dict[str, str]:
    """Why rivals were not measured, as the note of a GPU result says it."""
    return dict(re.findall(r"(\w+) was not measured: ([^.]+)\.", result.get("note", "")))


def _conditions(measured: list[Measurement]) -> str:
    gpu = load(GPU_RESULT)
    row = next(row for row in gpu["steps"] if row["model"] == GPU_MODEL)
    origin = re.sub(r"\w+ was not measured: [^.]+\.", "", gpu.get("note", "")).strip()
    others = [
        f"{entry['model'].partition(',')[0]} {entry['step_time']:.2f} x and {entry['memory']:.2f} x"
        for entry in _gpu_expectations()
        if entry["result"] == f"{GPU_RESULT}.json" and entry["model"] != gpu_model(row)
    ]
    against = (
        f"Time and memory of other models against PEFT: {', '.join(others)}." if others else ""
    )
    return "\n".join(
        [
            _wrapped(
                "A cell is the ratio of peftkit to the other (peftkit : the other); below 1 is better. "
                "LoRA of rank 16 on all linears, AdamW."
            ),
            "",
            *(
                _wrapped(
                    f"- CPU: {_processor(cpu.result)}; {cpu_model(CPU_CASE)}. {_repeated(cpu.command, cpu.file)}"
                )
                for cpu in measured
            ),
            _wrapped(
                f"- GPU: {gpu['environment']['gpu']}; {gpu_model(row)}, random weights. {_repeated('make gpu', f'{GPU_RESULT}.json')} "
                f"{origin} {against}"
            ),
        ]
    )


def _processors() -> str:
    parts = load("parts-smollm2")
    without = _parts_row(parts, "native attention")
    other = load(OLDER_CPU)
    own, stock = (best_run(other["runs"][name]) for name in ("peftkit", "peft"))
    again = [own[key] / stock[key] for key in ("step_seconds", "peak_bytes")]
    older = (
        f"How much that is varies: on an older processor of this kind ({machine(other['environment'])}; {_link(f'{OLDER_CPU}.json')}) "
        f"the step takes {again[0]:.2f} x PEFT's time and {again[1]:.2f} x its memory. "
    )
    return _wrapped(
        "On the CPU the gain in time depends on the processor. With AVX-512, if it is not Intel's, peftkit multiplies matrices with oneDNN, "
        f"faster than torch's BLAS does there. {older}With oneDNN off, peftkit takes {without['step_time']:.2f} x "
        f"PEFT's time and {without['memory']:.2f} x its memory ({machine(parts['environment'])}; {_link('parts-smollm2.json')}). On other "
        "processors both multiply alike, and only what is around the products is saved. `peftkit doctor` says what to expect on your machine."
    )


def _repeated(command: str, file: str) -> str:
    return f"`{command}` repeats it ({_link(file)})."


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        text, 140, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _link(file: str) -> str:
    return f"[result](benchmarks/results/{file})"


def cpu_model(case: str) -> str:
    """The model and batch of a CPU case."""
    sizes = CASES[case]
    return f"{MODELS[case]}, {sizes.batch_size} x {sizes.sequence_length} tokens, float32"


def gpu_model(row: dict[str, Any]) -> str:
    """The model and batch of a row of a GPU result."""
    return f"{row['model']}, {row['batch']} x {row['tokens']} tokens, bfloat16"


def chose_onednn(result: dict[str, Any]) -> bool:
    """Whether peftkit multiplied with oneDNN in a CPU result: only then do its products differ in time from torch's."""
    where = result["environment"]
    if "products" in where:
        return where["products"] == "oneDNN"
    return all(
        run["chosen_seconds"] < 0.9 * run["torch_seconds"] for run in result["runs"]["floor"]
    )


def _processor(result: dict[str, Any]) -> str:
    # oneDNN is chosen only on processors with AVX-512; older results do not name the instructions
    known = "instructions" in result["environment"] or not chose_onednn(result)
    return machine(result["environment"]) if known else f"{machine(result['environment'])}, AVX-512"


def expectations() -> dict[str, list[dict[str, Any]]]:
    """The figures against PEFT that travel with the package, as ``peftkit/expectations.json`` holds them.

    Returns:
        ``cpu`` and ``gpu``: one entry for each measured model, with ``model``, ``machine`` (the name of the processor or card),
        ``label`` (for readers), ``step_time`` and ``memory`` (ratios to PEFT) and ``result``, the file. CPU entries also have
        ``threads``, ``onednn`` and ``native`` (whether oneDNN and the native passes ran) and ``switched_off`` (whether parts that the
        processor has were switched off for the measurement). GPU entries have ``capability``.
    """
    return {"cpu": _cpu_expectations(), "gpu": _gpu_expectations()}


def _cpu_trained() -> list[dict[str, Any]]:
    found = []
    for case in Training.CASES:
        for cpu in cpu_measurements(case):
            entry = {"model": cpu_model(case), **_machine(cpu.result)}
            entry |= {"label": _processor(cpu.result), "onednn": chose_onednn(cpu.result)}
            entry |= {"native": True, "switched_off": cpu.is_limited}
            found.append(entry | _ratios(cpu_steps(cpu.result)) | {"result": cpu.file})
    return found


def _cpu_expectations() -> list[dict[str, Any]]:
    found, parts = _cpu_trained(), load("parts-smollm2")
    for last, native, off in (
        ("native attention", True, "oneDNN off"),
        ("logit-free loss", False, "oneDNN and native passes off"),
    ):
        entry = {"model": cpu_model("smollm2"), **_machine(parts)}
        entry |= {"label": f"{machine(parts['environment'])}, {off}", "onednn": False}
        entry |= {"native": native, "switched_off": True}
        found.append(entry | _parts_row(parts, last) | {"result": "parts-smollm2.json"})
    return found


def _machine(result: dict[str, Any]) -> dict[str, Any]:
    where = result["environment"]
    return {"machine": where.get("processor", where["cpu"]), "threads": where["threads"]}


def _parts_row(parts: dict[str, Any], last: str) -> dict[str, float]:
    """The ratios to PEFT with all parts up to ``last``."""
    number = list(PARTS).index(last) + 1
    runs = {"": best_run(parts["runs"][f"parts-{number}"]), "PEFT": best_run(parts["runs"]["peft"])}
    return _ratios({k: Step(run["step_seconds"], run["peak_bytes"]) for k, run in runs.items()})


def _gpu_expectations() -> list[dict[str, Any]]:
    found = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        result = load(path.stem)
        card = result["environment"]["gpu"]
        capability = result["environment"].get("capability") or CAPABILITIES.get(card)
        for row in {row["model"]: row for row in reversed(result["steps"])}.values():
            steps = gpu_steps(result, row["model"])
            if {"", "PEFT"} <= steps.keys():
                entry = {"model": gpu_model(row), "machine": card, "label": card}
                entry |= {"capability": capability, **_ratios(steps), "result": path.name}
                found.append(entry)
    return sorted(found, key=lambda entry: (entry["result"], entry["model"]))


def _ratios(steps: dict[str, Step]) -> dict[str, float]:
    own, stock = steps[""], steps["PEFT"]
    return {
        "step_time": round(own.seconds / stock.seconds, 2),
        "memory": round(own.growth / stock.growth, 2),
    }
