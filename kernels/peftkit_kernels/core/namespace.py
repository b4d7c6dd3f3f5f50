"""The namespace of the package's torch.library ops.

A copy of the package on the Hugging Face kernels hub has another file here, because several versions of it may be loaded at the same
time (``tools/kernels_hub.py``).
"""


def library_name(name: str) -> str:
    """The full name of an op: ``"peftkit::lora_linear"``."""
    return f"peftkit::{name}"
