"""Time of each operation against eager torch and torch.compile on this device, and the crossovers of schedules on a GPU.

    python benchmarks/run.py kernels                       # on the CPU, float32, 512 rows of width 2048
    python benchmarks/run.py kernels --op lora_linear --providers peftkit eager
    python benchmarks/run.py kernels --gpu                 # bfloat16, at the sizes of the predictions and next to them
    python benchmarks/run.py kernels --calibrate           # measure this GPU's crossovers and save them

Eager torch runs the operation's definition with autograd. Before any timing, every output and gradient is compared with float64.
Providers run in turn, so that a machine that slows down affects all of them.

A crossover is the size at which one schedule of an operation becomes slower than another.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tools_path  # noqa: F401
import torch
from report import environment, machine, save

from lab.case import Case, Sizes
from lab.cases import FACTOR, OPERATIONS, build
from lab.testing import assert_no_worse_than
from peftkit_kernels.core import calibration
from peftkit_kernels.core.dispatch import triton_obstacle

HELP = "each operation alone"

Call = Callable[[], Any]

PROVIDERS = ("peftkit", "eager", "compiled")
_WIDE = {"lora_swiglu_mlp": 8192, "linear_cross_entropy": 32768}
"""Output widths that differ from the model's width: the inner width of an MLP, and a vocabulary."""
_CPU = Sizes(M=512, K=2048, N=2048)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--op", choices=OPERATIONS, action="append", help="default: all")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each provider")
    parser.add_argument(
        "--gpu", action="store_true", help="run on the GPU and show the predictions too"
    )
    parser.add_argument("--calibrate", action="store_true", help="measure the GPU's crossovers")


def run(arguments: argparse.Namespace) -> None:
    """Measure each operation against eager torch and torch.compile, or the crossovers of this GPU."""
    if arguments.calibrate:
        print(calibrate_and_keep())
        return
    rows, found = measure_all(arguments), environment()
    save({"environment": found, "rows": rows}, f"kernels-{'gpu' if arguments.gpu else 'cpu'}")
    text = table(rows, torch.cuda.get_device_name() if arguments.gpu else machine(found))
    print(text)


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the selected operations.

    Raises:
        SystemExit: ``--gpu`` was given and there is no usable GPU.
    """
    device = "cuda" if arguments.gpu else "cpu"
    if arguments.gpu:
        require_gpu()
    rows = []
    for op in arguments.op or OPERATIONS:
        sizes = gpu_sizes(op) if arguments.gpu else cpu_sizes(op)
        for variant in OPERATIONS[op].variants:
            print(f"{variant} on {device}", file=sys.stderr, flush=True)
            rows += measure(
                *(op, variant, sizes),
                device=device,
                providers=arguments.providers,
                rounds=arguments.rounds,
            )
    if arguments.gpu:
        add_predictions(rows, torch.cuda.get_device_name())
    return rows


def require_gpu() -> None:
    """Raise ``SystemExit`` with the reason if nothing can be measured on a GPU."""
    obstacle = "torch sees no GPU on this machine"
    if torch.cuda.is_available():
        x = torch.empty(1, device="cuda", dtype=torch.bfloat16)
        obstacle = triton_obstacle("lora_linear", x)
    if obstacle is not None:
        raise SystemExit(
            f"{obstacle}: there is nothing for --gpu and --calibrate to measure; without them the CPU is measured"
        )


def calibrate_and_keep() -> str:
    """Measure this GPU's crossovers and save them for later processes; returns a line that says what was saved and where."""
    require_gpu()
    device, found = torch.cuda.get_device_name(), calibrate()
    return f"{device}: {found}, kept in {calibration.save(device, found)}"


def cpu_sizes(op: str) -> Sizes:
    """Training sizes for a CPU: 512 tokens of width 2048."""
    return dataclasses.replace(_CPU, N=_WIDE.get(op, _CPU.N))


def gpu_sizes(op: str) -> Sizes:
    """The sizes for which ``lab.predict`` has a prediction."""
    from lab.predict import SIZES

    return SIZES.get(op, SIZES["lora_linear"])[0]


def measure(
    op: str,
    variant: str,
    sizes: Sizes,
    *,
    device: str = "cpu",
    providers: Sequence[str] = PROVIDERS,
    rounds: int = 9,
    timer: Callable[[Call], float] | None = None,
) -> list[dict[str, Any]]:
    """Time one variant: one row per mode (``forward``, ``step``) and provider, in milliseconds.

    Args:
        op: A key of ``OPERATIONS``.
        variant: One of its variants.
        sizes: Sizes of its inputs.
        device: ``"cpu"`` (float32) or ``"cuda"`` (bfloat16).
        providers: Some of ``PROVIDERS``.
        rounds: Timed runs of each provider, after one run to warm up.
        timer: Returns the seconds of a call; by default the clock of the device.

    Raises:
        AssertionError: A result is further from float64 than plain torch's rounding explains.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = build(op, variant, sizes, dtype=dtype, device=device)
    check(case)
    rows = []
    for mode, run in modes(case).items():
        calls = {provider: run(function_of(case, provider)) for provider in providers}
        times = interleaved(calls, rounds, timer or clock(device))
        eager = quantile(times["eager"], 0.5) if "eager" in times else None
        for provider, seconds in times.items():
            median = quantile(seconds, 0.5)
            rows.append(
                {
                    "op": variant,
                    **dataclasses.asdict(sizes),
                    "dtype": str(dtype).removeprefix("torch."),
                    "mode": mode,
                    "provider": provider,
                    "median_ms": round(1e3 * median, 4),
                    "p20_ms": round(1e3 * quantile(seconds, 0.2), 4),
                    "p80_ms": round(1e3 * quantile(seconds, 0.8), 4),
                    "over_eager": None if eager is None else round(median / eager, 3),
                }
            )
    return rows


def check(case: Case) -> None:
    """Raise ``AssertionError`` unless every output and gradient is about as close to float64 as plain torch's."""
    case = dataclasses.replace(case, call=case.by_rows or case.call)
    actual, plain = case.run("auto"), case.run("reference")
    truth = case.to(torch.float64).run("reference")
    for name, value in actual.items():
        assert_no_worse_than(value, plain[name], truth[name], name, FACTOR)


def function_of(case: Case, provider: str) -> Callable[[dict], Any]:
    """The function that a provider runs on the tensors."""
    if provider == "peftkit":
        return lambda leaves: case.call(leaves, "auto")
    if provider == "eager":
        return lambda leaves: case.call(leaves, "reference")
    return torch.compile(lambda leaves: case.call(leaves, "reference"))


def modes(case: Case) -> dict[str, Callable[[Callable], Call]]:
    """The ways to run a provider's function: without gradients and, if anything is trained, forward and backward."""

    def forward(function: Callable) -> Call:
        def call() -> None:
            with torch.no_grad():
                function(case.leaves)

        return call

    trained = [leaf for leaf in case.leaves.values() if leaf.requires_grad]
    grads: list[torch.Tensor] = []

    def step(function: Callable) -> Call:
        def call() -> None:
            outputs = function(case.leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if not grads:
                grads.extend(torch.randn_like(y) for y in outputs)
            torch.autograd.grad(outputs, trained, grads)

        return call

    return {"forward": forward, "step": step} if trained else {"forward": forward}


def interleaved(
    calls: Mapping[str, Call], rounds: int, timer: Callable[[Call], float]
) -> dict[str, list[float]]:
    """Seconds of every call in every round. Calls run in turn; the first round is discarded."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = timer(call)
            if number:
                times[name].append(seconds)
    return times


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)]


def clock(device: str) -> Callable[[Call], float]:
    """A timer that returns the seconds of one call; the device's queue is empty before and after it."""

    def seconds(call: Call) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds


def add_predictions(rows: list[dict[str, Any]], gpu: str) -> None:
    """Add ``predicted_ms`` to each row: the prediction for this GPU if the operation has one and the row is a step, else ``None``."""
    from lab import predict
    from lab.devices import DEVICES

    device = next((d for d in DEVICES if d.name.replace(" ", "") in gpu.replace(" ", "")), None)
    for row in rows:
        row["predicted_ms"] = None
        op = next(op for op, found in OPERATIONS.items() if row["op"] in found.variants)
        if device is None or op not in predict.OPS or row["mode"] != "step":
            continue
        sizes = Sizes(*(row[field.name] for field in dataclasses.fields(Sizes)))
        expected = predict.predict(op, row["op"], sizes, device)
        key = {"peftkit": "microseconds", "eager": "eager_microseconds"}.get(row["provider"])
        row["predicted_ms"] = None if key is None else expected[key] / 1e3


def table(rows: Sequence[Mapping[str, Any]], where: str) -> str:
    """The rows as a Markdown table: one line per operation and mode, each time next to its ratio to eager torch."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    predicted = any(row.get("predicted_ms") is not None for row in rows)
    head = ["operation", "M, K, N", "mode"]
    for provider in providers:
        head += [f"{provider} (ms)", *([] if provider == "eager" else ["/ eager"])]
        head += ["predicted (ms)"] if predicted and provider != "compiled" else []
    lines = [where, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    groups: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        sizes = f"{row['M']}, {row['K']}, {row['N']}"
        groups.setdefault((row["op"], sizes, row["mode"]), {})[row["provider"]] = row
    for key, found in groups.items():
        cells = list(key)
        for provider in providers:
            row = found[provider]
            cells.append(f"{row['median_ms']:.2f}")
            cells += [] if provider == "eager" else [f"{row['over_eager']:.2f}"]
            if predicted and provider != "compiled":
                value = row["predicted_ms"]
                cells.append("" if value is None else f"{value:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def crossover(
    sizes: Sequence[int], first: Callable[[int], float], second: Callable[[int], float]
) -> int:
    """The largest of the ascending ``sizes`` up to which ``first`` takes no longer than ``second``; 0 if there is none."""
    found = 0
    for size in sizes:
        if first(size) > second(size):
            break
        found = size
    return found


def calibrate(timer: Callable[[Call], float] | None = None) -> calibration.Calibration:
    """Measure the crossovers of this GPU's schedules; the fields of ``Calibration`` name the schedules."""
    timer = timer or clock("cuda")
    return calibration.Calibration(fused_width(timer), small_m(timer))


def fused_width(timer: Callable[[Call], float]) -> int:
    """The largest width at which adding the LoRA update inside the product is no slower than computing the update first."""
    from peftkit_kernels.low_rank import passes

    M, R = 8192, 16

    def tensors(width: int) -> list[torch.Tensor]:
        shapes = (M, width), (width, width), (M, R), (width, R)
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]

    def fused(width: int) -> float:
        x, weight, s, B = tensors(width)
        return best(lambda: passes.gemm_lora(x, weight, s, B, 1.0), timer)

    def added(width: int) -> float:
        x, weight, s, B = tensors(width)
        return best(lambda: passes.expand(s, B, 1.0).addmm_(x, weight.t()), timer)

    return crossover((512, 1024, 1536, 2048, 3072, 4096, 6144, 8192), fused, added)


def small_m(timer: Callable[[Call], float]) -> int:
    """The largest number of rows at which decoding an NF4 weight inside the product is no slower than decoding it first."""
    from peftkit_kernels.storage.nf4 import quantize_nf4
    from peftkit_kernels.storage.product import passes as quantized
    from peftkit_kernels.storage.quantized import decode_triton

    N, K, dtype = 16384, 4096, torch.bfloat16  # enough columns for every GPU
    q = quantize_nf4(torch.randn((N, K), device="cuda", dtype=dtype))

    def inside(rows: int) -> float:
        x = torch.randn((rows, K), device="cuda", dtype=dtype)
        return best(lambda: quantized.small_m(x, q, None, None, None, 1.0), timer)

    def before(rows: int) -> float:
        x = torch.randn((rows, K), device="cuda", dtype=dtype)
        return best(lambda: torch.mm(x, decode_triton(q, dtype).t()), timer)

    return crossover((1, 8, 16, 32, 64, 128, 256, 512), inside, before)


def best(call: Call, timer: Callable[[Call], float], rounds: int = 20) -> float:
    """The median time of ``rounds`` calls, after one call that compiles."""
    return quantile(interleaved({"": call}, rounds, timer)[""], 0.5)
