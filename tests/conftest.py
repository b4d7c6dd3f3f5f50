"""Fixtures shared by all tests; the tiny models themselves are in ``models.py``."""

import gc
import os
import sys

import pytest

# Read when huggingface_hub is first imported. A test that tries to use the network fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Read when triton is first imported. Kernels run in its interpreter on CPU tensors. Tests of the compiler start a child process
# without this variable (``compiler.py``).
os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when torch is first imported, here and in child processes. Each of several workers has one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Leave what was imported so far out of garbage collections: each would take 0.3 s, and a short training run makes several."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter collect everything at its end; libraries report what they find then."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_plans():
    """Drop launch plans after each test, because a test may have replaced a function that a schedule called."""
    yield
    if "peftkit_kernels.core.plan" in sys.modules:
        sys.modules["peftkit_kernels.core.plan"].clear()


@pytest.fixture
def one_thread():
    """Use one thread in a test, because tiny models gain nothing from more threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def joint_sizes(monkeypatch):
    """The number of trainings in each pass that ``peftkit.finetune.together`` computes in training mode, in order.

    With this fixture passes are joint on a CPU too.
    """
    from peftkit.finetune.together import passes
    from peftkit.finetune.together.passes import JointPasses

    monkeypatch.setattr(passes, "JOINT_DEVICES", ("cpu",))
    monkeypatch.setattr(passes, "JOINT_TOKENS", 10**6)
    found = []
    compute = JointPasses._all

    def record(self, part, training, given):
        if training:
            found.append(len(given))
        return compute(self, part, training, given)

    monkeypatch.setattr(JointPasses, "_all", record)
    return found


@pytest.fixture
def tiny():
    """``models.tiny``: builds a tiny model by name."""
    import models

    return models.tiny


@pytest.fixture
def batch():
    """``models.batch``: makes a batch for a tiny model by name."""
    import models

    return models.batch
