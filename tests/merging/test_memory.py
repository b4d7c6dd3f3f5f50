"""Merging needs memory for a few copies of the largest layer, not for a second model."""

import os
import subprocess
import sys

import pytest
from markers import slow_if

_CHILD = """
import sys, threading, time
import torch, transformers as hf
from peft import LoraConfig, get_peft_model
from peftkit import merge

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

torch.set_num_threads(1)
config = hf.LlamaConfig(vocab_size=256, hidden_size=512, intermediate_size=2048, num_hidden_layers=int(sys.argv[2]),
    num_attention_heads=8, num_key_value_heads=8)
model = hf.LlamaForCausalLM(config).to(getattr(torch, sys.argv[3]))
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        parameter.data.normal_(0, 0.1)
ids = torch.randint(0, 256, (2, 8))
merge(model, sys.argv[1] + "/warm", probe=ids, rounding="nearest", min_recovery=None)
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
merge(model, sys.argv[1] + "/merged", probe=ids, rounding="nearest", min_recovery=None)
done = True
thread.join()
print(peak - start)
"""
LARGEST = 512 * 2048 * 4
"""Bytes of the largest layer in float32."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", slow_if("float32".__eq__, ["float32", "bfloat16"]))
def test_the_peak_does_not_grow_with_the_model(dtype, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    grown = []
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(folder), str(layers), dtype]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        grown.append(int(result.stdout.split()[-1]))
    model = 8 * (4 * 512 * 512 + 3 * 512 * 2048) * (4 if dtype == "float32" else 2)
    assert max(grown) < 8 * LARGEST, [g / LARGEST for g in grown]
    assert grown[1] < model / 2
    assert grown[1] - grown[0] < LARGEST, "the peak grows with the number of layers"
