"""Element-wise passes of the CPU path as one pass each, in C, built once with the machine's own compiler."""


def takes(*tensors):
    return False
