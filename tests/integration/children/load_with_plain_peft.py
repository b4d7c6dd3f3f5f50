"""A process without peftkit: load a saved adapter by plain PEFT, compute logits, merge, compute them again.

Usage: load_with_plain_peft.py BASE ADAPTER BATCH OUT (folders of save_pretrained; files of torch.save)
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, batch, out = sys.argv[1:]
torch.set_num_threads(1)
inputs = torch.load(batch)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    logits = model(**inputs).logits
    merged = model.merge_and_unload()
    merged_logits = merged(**inputs).logits
assert not any(name.split(".")[0] in ("peftkit", "peftkit_kernels") for name in sys.modules)
torch.save({"logits": logits, "merged_logits": merged_logits, "merged": merged.state_dict()}, out)
