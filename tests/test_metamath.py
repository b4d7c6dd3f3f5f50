"""PEFT's comparison of methods runs with our layers: in a folder that has its functions, without its data and its GPU."""

import json

import pytest
from benchmark_scripts import load_script
from markers import slow_if

UTILS = """
import torch, transformers
from peft import get_peft_model
from report import PLACE  # the folder's own module, though ours has the same name

RESULT_PATH = RESULT_PATH_TEST = RESULT_PATH_CANCELLED = "here"


def get_base_model(seed):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=32)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def get_model(seed, config):
    model = get_base_model(seed)
    return model if config is None else get_peft_model(model, config, autocast_adapter_dtype=True)


def log_results(text):
    with open(f"{RESULT_PATH}/found.json", "w") as stream:
        stream.write(text)
"""
RUN = """
import json, os, sys
import torch
from peft import PeftConfig
from utils import get_model, log_results

experiment = sys.argv[-1]
has_adapter = os.path.exists(f"{experiment}/adapter_config.json")
model = get_model(3, PeftConfig.from_pretrained(experiment) if has_adapter else None)
ids = torch.arange(8)[None]
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
import peftkit
fused = "loss without logits: yes" in str(peftkit.explain(model))
log_results(json.dumps({"loss": loss.item(), "fused": fused}))
"""


@pytest.fixture
def folder(tmp_path):
    from peft import LoraConfig

    path = tmp_path / "MetaMathQA"
    files = {"utils.py": UTILS, "run.py": RUN, "report.py": "PLACE = 1", "data.py": ""}
    for name, text in (files | {"default_training_params.json": "{}"}).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    LoraConfig(r=2, target_modules=targets).save_pretrained(path / "experiments" / "lora" / "small")
    (path / "experiments" / "full" / "all").mkdir(parents=True)
    return path


def measure(folder, experiment, library, out):
    import argparse

    script = load_script("metamath")
    parser = argparse.ArgumentParser()
    script.add_options(parser)
    script.run(
        parser.parse_args([str(folder), experiment, "--library", library, "--out", str(out)])
    )
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize(
    "experiment",
    slow_if("experiments/full/all".__eq__, ["experiments/lora/small", "experiments/full/all"]),
)
def test_both_libraries_run_the_same_experiment(experiment, folder, tmp_path):
    before = sorted(folder.rglob("*"))
    own, stock = (
        measure(folder, experiment, library, tmp_path / library) for library in ("peftkit", "PEFT")
    )
    assert (own["fused"], stock["fused"]) == (True, False)
    assert own["loss"] == pytest.approx(stock["loss"], rel=1e-5)
    assert [p for p in sorted(folder.rglob("*")) if "__pycache__" not in str(p)] == before


def test_another_folder_and_a_missing_experiment_are_named(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"has no run\.py; name the folder method_comparison"):
        measure(tmp_path, "x", "peftkit", tmp_path / "out")
    with pytest.raises(SystemExit, match="experiments/lora/large is no folder in"):
        measure(folder, "experiments/lora/large", "peftkit", tmp_path / "out")
    (folder / "run.py").write_text("raise RuntimeError('CUDA is not available')")
    with pytest.raises(SystemExit, match="the comparison has failed with status 1"):
        measure(folder, "experiments/lora/small", "peftkit", tmp_path / "out")
