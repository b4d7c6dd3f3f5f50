"""One row of the GPU benchmark, in a process of its own: ``gpu_row.py PART JSON`` prints ``{"rows": [...]}`` as its last line.

A row that cannot be measured ends with an error, whose last line is the reason.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import tools_path  # noqa: F401
import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYER = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
_8B = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}
MODELS = {
    "Llama-3.1-8B": _8B,
    "8 layers of Llama-3.1-8B": _8B | {"num_hidden_layers": 8},
    "Llama-3.2-1B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
        "tie_word_embeddings": True,
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128},
    },
}
WARM, STEPS = 2, 6


def main() -> None:
    """Run the part that the command line names."""
    part, arguments = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps({"rows": PARTS[part](**arguments)}))


def values(tiny: bool = False) -> list[dict[str, Any]]:
    """Every op in bfloat16 against float64 on the device, twice: right, wrong, refused or out of memory."""
    from lab.case import Sizes
    from lab.cases import FACTOR, OPERATIONS, build
    from lab.testing import error_and_allowed

    sizes = Sizes(M=24, K=64, N=96, R=8) if tiny else Sizes(M=768, K=1024, N=1536, R=16, p=0.1)
    backend, rows = "triton" if DEVICE == "cuda" else "auto", []
    for op, operation in OPERATIONS.items():
        for variant in operation.variants:
            row: dict[str, Any] = {"op": variant, "result": "right"}
            try:
                case = build(op, variant, sizes, dtype=torch.bfloat16, device=DEVICE)
                truth, plain = case.to(torch.float64).run("reference"), case.run("reference")
                own, again = case.run(backend), case.run(backend)
            except torch.cuda.OutOfMemoryError:
                row["result"] = "out of memory"
            except ValueError as error:  # the op says why it cannot run
                row |= {"result": "refused", "reason": str(error)[:200]}
            else:
                checks = {
                    n: error_and_allowed(v, plain[n], truth[n], FACTOR) for n, v in own.items()
                }
                wrong = [n for n, (error, allowed) in checks.items() if not error <= allowed]
                row["changing"] = [n for n, v in own.items() if not torch.equal(v, again[n])]
                if wrong:
                    row |= {"result": "wrong", "wrong": wrong}
            rows.append(row)
    return rows


def parity(family: str) -> list[dict[str, Any]]:
    """Loss and gradients of a model in bfloat16, peftkit and PEFT, each against PEFT in float32.

    ``wrong`` is true if peftkit is more than twice as far from float32 as PEFT.
    """
    import copy

    import transformers

    from peftkit import accelerate

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[family]
    large = DEVICE == "cuda"
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "vocab_size": 4096,
    }
    if not large:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "vocab_size": 128,
        }
    torch.manual_seed(0)
    config = config_class(**sizes, num_attention_heads=8, num_key_value_heads=2, pad_token_id=0)
    wide = adapted(model_class(config).to(DEVICE), dtype=torch.float32)
    ids = torch.randint(1, sizes["vocab_size"], (2, 600 if large else 24), device=DEVICE)
    narrow = {"PEFT": copy.deepcopy(wide).bfloat16(), "peftkit": copy.deepcopy(wide).bfloat16()}
    accelerate(narrow["peftkit"])
    expected = loss_and_grads(wide, ids)
    found = {name: distance(loss_and_grads(model, ids), expected) for name, model in narrow.items()}
    row = {"family": family, **{f"{name}_distance": d for name, d in found.items()}}
    return [row | {"wrong": found["peftkit"] > 2 * found["PEFT"] + 1e-3}]


def adapted(model: nn.Module, dtype: torch.dtype, **config: Any) -> Any:
    """The model with PEFT's LoRA of rank 16 on all linears of its layers; no factor is zero."""
    from peft import LoraConfig, get_peft_model

    options = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": LAYER,
        "task_type": "CAUSAL_LM",
    } | config
    wrapped: Any = get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped.train()


def loss_and_grads(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The loss and every gradient of one step."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The relative distance of all gradients together."""
    pairs = list(zip(found[1:], expected[1:], strict=True))
    apart = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    return float((apart / sum(b.double().square().sum() for _, b in pairs)).sqrt())


def steps(model: str, batch: int, tokens: int, provider: str) -> list[dict[str, Any]]:
    """Seconds and memory of a training step in bfloat16 with random weights and AdamW."""
    torch.manual_seed(0)
    net = provided(provider, model)
    vocabulary = MODELS[model]["vocab_size"]
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    ids = torch.randint(vocabulary, (batch, tokens), device=DEVICE, generator=generator)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=DEVICE == "cuda")
    loaded = reset_peak()
    losses, walls, hosts = [], [], []

    def step() -> Tensor:
        loss = net(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    for i in range(WARM + STEPS):
        synchronise()
        start = time.perf_counter()
        loss = step()
        issued = time.perf_counter() - start
        synchronise()
        wall = time.perf_counter() - start
        losses.append(round(loss.item(), 4))
        if i >= WARM:
            walls.append(wall)
            hosts.append(issued)
    peak = reset_peak(read=True)
    row = {
        **{"model": model, "batch": batch, "tokens": tokens, "provider": provider_name(provider)},
        "step_s": round(statistics.median(walls), 4),
        "best_step_s": round(min(walls), 4),
        "host_s": round(statistics.median(hosts), 4),
        "tokens_per_s": round(batch * tokens / statistics.median(walls)),
        "peak_gib": round(peak / 2**30, 2),
        "growth_gib": round((peak - loaded) / 2**30, 2),
        "losses": losses,
    }
    busy = busy_seconds(step)
    return [row if busy is None else row | {"busy_s": round(busy, 4)}]


def provider_name(provider: str) -> str:
    """The provider with its version, if it is another library that changes quickly."""
    if provider != "Unsloth":
        return provider
    from importlib.metadata import version

    return f"Unsloth {version('unsloth')}"


def provided(provider: str, model: str) -> Any:
    """The model of a provider, ready to train."""
    if provider == "Unsloth":
        return unsloth(model)
    name, _, option = provider.partition(", ")
    name, _, kind = name.partition(" ")
    if name == "Liger":
        kind = ""
    net = base(model)
    if name == "full":
        return net.train()
    if name == "Liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=net)
    if kind in ("NF4", "int8"):
        quantise(net, kind)
    if kind in ("prefix", "bottleneck"):
        from peftkit import BottleneckConfig, PrefixConfig, wrap

        return wrap(net, PrefixConfig() if kind == "prefix" else BottleneckConfig()).train()
    rate = float(option.split()[1]) if option.startswith("dropout") else 0.0
    rank = int(option.split()[1]) if option.startswith("rank") else 16
    config = {"r": rank, "use_dora": kind == "DoRA", "lora_dropout": rate}
    net = adapted(net, torch.bfloat16, **config)
    if name == "peftkit":
        from peftkit import accelerate

        accelerate(net)
    if option == "checkpointed":
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable({"use_reentrant": False})
    return net.train()


def base(model: str) -> Any:
    """The model with random weights in bfloat16, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**MODELS[model], max_position_embeddings=8192, use_cache=False)
    with torch.device(DEVICE):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)


def quantise(net: Any, kind: str) -> None:
    """Store the linears of the layers as bitsandbytes does."""
    import bitsandbytes as bnb

    for layer in net.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if type(linear) is not nn.Linear:
                    continue
                sizes = linear.in_features, linear.out_features
                if kind == "NF4":
                    new = bnb.nn.Linear4bit(
                        *sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                    )
                    new.weight = bnb.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4"
                    )
                else:
                    new = bnb.nn.Linear8bitLt(
                        *sizes, bias=False, has_fp16_weights=False, threshold=0.0
                    )
                    new.weight = bnb.nn.Int8Params(
                        linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
                    )
                setattr(parent, name, new.to(DEVICE))
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "NF4", kind == "int8"
    net.quantization_method = "bitsandbytes"


def unsloth(model: str) -> Any:
    """The model by Unsloth, which reads it from a folder."""
    import tempfile

    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        base(model).save_pretrained(folder)
        net, _ = FastLanguageModel.from_pretrained(folder, dtype=torch.bfloat16, load_in_4bit=False)
    return FastLanguageModel.get_peft_model(net, r=16, lora_alpha=32, target_modules=LAYER).train()


def busy_seconds(step: Callable[[], Any]) -> float | None:
    """The time in which the GPU computes during one step; ``None`` without a GPU."""
    if DEVICE != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        synchronise()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def reset_peak(read: bool = False) -> int:
    """Bytes in use, or the peak since the last reset; 0 without a GPU."""
    if DEVICE != "cuda":
        return 0
    if read:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def kernels() -> list[dict[str, Any]]:
    """Each operation next to eager torch and to its prediction."""
    import operations

    found = []
    for op in ("lora_linear", "lora_qkv", "lora_swiglu_mlp", "linear_cross_entropy"):
        for variant in operations.OPERATIONS[op].variants:
            options = {"device": "cuda", "providers": ["peftkit", "eager"], "rounds": 5}
            found += operations.measure(op, variant, operations.gpu_sizes(op), **options)
    operations.add_predictions(found, torch.cuda.get_device_name())
    return found


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "values": values,
    "parity": parity,
    "steps": steps,
    "kernels": kernels,
}

if __name__ == "__main__":
    main()
