"""Checks GPU kernels on machines without a GPU: values, bytes and machine code. Import the module that you need.

``interp`` makes Triton's interpreter compute the values of a GPU, ``traffic`` counts the bytes of every launch and finds races
and accesses out of bounds, ``eager`` counts the bytes of torch ops by the same rule, ``aot`` compiles for real targets,
``machine_code`` reads the result, and ``devices``, ``l2sim`` and ``predict`` turn bytes and FLOPs into predicted times.
``testing`` has running-error bounds and counts the bytes that autograd keeps; the tests of every backend use it. ``cli`` has the
commands.
"""
