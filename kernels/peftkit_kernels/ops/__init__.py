"""The operations, one folder each: its definition in plain torch, what it runs on a CPU, and its Triton kernels."""
