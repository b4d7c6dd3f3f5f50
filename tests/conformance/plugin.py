"""pytest plugin for PEFT's own test suite: keeps the LoRA tests, and can fuse every layer that they create.

Loaded by ``run.py`` with ``-p plugin``. Two environment variables configure it:
``PEFTKIT_CONFORMANCE_OUT`` names the JSON file that receives
``{"outcomes": {test: outcome}, "fused_layers": number, "skipped": {test: reason}}``, and ``PEFTKIT_CONFORMANCE_MODE`` is
``stock``, ``fused``, ``fused-torch-blas`` (fused, with PyTorch's own matrix products) or ``own`` (the common tests on peftkit's own
methods, see ``own_types.py``).
"""

import contextlib
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy
import own_types
import pytest
import torch

_LORA = re.compile(r"(?<![A-Za-z])LoraConfig")

# Test modules about LoRA, or about code that LoRA uses, whose test ids do not name LoRA.
_WHOLE_MODULES = {
    "test_arrow.py",
    "test_auto.py",
    "test_bdlora.py",
    "test_helpers.py",
    "test_hub_features.py",
    "test_incremental_pca.py",
    "test_initialization.py",
    "test_integrations.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lora_variants.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_mixed.py",
    "test_other.py",
    "test_riemannian_lora.py",
    "test_target_parameters.py",
    "test_torch_compile.py",
    "test_trainable_tokens.py",
    "test_tuners_utils.py",
    "test_velora.py",
    "test_xlora.py",
}

_outcomes = pytest.StashKey[dict[str, str]]()
_fused = pytest.StashKey[Counter]()
_skipped = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Prevent network access and, in mode ``fused``, fuse each LoRA layer at its creation."""
    from tests import testing_utils

    # PEFT's function goes online once for each model id; the fake cache has what the tests need.
    testing_utils.hub_online_once = lambda model_id: contextlib.nullcontext()
    config.stash[_outcomes] = {}
    config.stash[_fused] = Counter()
    config.stash[_skipped] = {}
    mode = os.environ["PEFTKIT_CONFORMANCE_MODE"]
    if mode.startswith("fused"):
        _fuse_at_creation(config.stash[_fused])
    if mode == "fused-torch-blas":
        _multiply_as_torch_does()
    if mode == "own":
        own_types.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that are not about LoRA or, in mode ``own``, not about our methods."""
    own = os.environ["PEFTKIT_CONFORMANCE_MODE"] == "own"
    kept, dropped = [], []
    for item in items:
        if own:
            wanted = own_types.method_of(item.nodeid) is not None
            reason = own_types.reason_against(item.nodeid)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
        else:
            wanted = item.path.name in _WHOLE_MODULES or _LORA.search(item.nodeid)
        (kept if wanted else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed every test, so that both modes use the same weights and data."""
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 - PEFT's tests draw from the global generator
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Record each test's outcome: that of the first phase that did not pass."""
    report = yield
    outcomes = item.config.stash[_outcomes]
    if outcomes.get(report.nodeid, "passed") == "passed":
        broken_outside = report.failed and report.when != "call"
        outcomes[report.nodeid] = "error" if broken_outside else report.outcome
    if report.skipped and isinstance(report.longrepr, tuple):
        item.config.stash[_skipped][report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outcomes."""
    result = {
        "outcomes": session.config.stash[_outcomes],
        "fused_layers": session.config.stash[_fused]["layers"],
        "skipped": session.config.stash[_skipped],
    }
    Path(os.environ["PEFTKIT_CONFORMANCE_OUT"]).write_text(json.dumps(result, indent=1))


def _fuse_at_creation(fused: Counter) -> None:
    from peft.tuners.lora import LoraModel

    from peftkit.fuse.linear import fuse_layer

    create = LoraModel._create_new_module

    def create_fused(*args, **kwargs):
        module = create(*args, **kwargs)
        fused["layers"] += fuse_layer(module)
        return module

    LoraModel._create_new_module = staticmethod(create_fused)


def _multiply_as_torch_does() -> None:
    from peftkit_kernels import gemm

    assert callable(gemm.prefers_onednn)
    gemm.prefers_onednn = lambda: False
