"""Shared by the tests of the Triton kernels: watching launches, and bounds with the kernels' roundings."""

import contextlib

import torch

from lab.interp import faithful
from lab.testing import Bound
from lab.traffic import Traffic
from peftkit_kernels.core.dropout import dropout_mask, keep_scale
from peftkit_kernels.core.schedule import Backward, Schedule
from peftkit_kernels.core.structure import build, encode, flatten

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ORDERS = ("reverse", 1, 2)
INT32_LIMIT = 5000
"""Row offsets in int32 exceed this limit in tensors with more elements. Offsets of small padded factors do not."""


def draw(*shape, dtype=torch.float32, seed=0):
    """A tensor of normal numbers."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@contextlib.contextmanager
def watched(**options):
    """Assert that all launches in this context stay in bounds and have no races; yields the record."""
    with Traffic() as traffic, faithful(**options):
        yield traffic
    traffic.check()


def opcheck(schedule, call, ops=None):
    """Let torch check the torch.library ops of a module ``ops.<op>.schedule``, with each gradient alone and with all.

    ``ops`` is one of its ``Schedule``s; it may be omitted if there is one.
    """
    if ops is None:
        (ops,) = (value for value in vars(schedule).values() if isinstance(value, Schedule))
    torch.library.opcheck(ops.library, encode(call))
    call = build(*_detached(flatten(call)))
    result, made = schedule.forward(schedule.TritonPasses(), call)
    grads = result.clone() if isinstance(result, torch.Tensor) else tuple(y.clone() for y in result)
    trained = schedule.trained(call)
    for one in [None, *range(len(flatten(trained).tensors))]:
        needs = _only(trained, one)
        kept = schedule.keep(call, result, made, needs)
        torch.library.opcheck(ops.library_backward, encode(Backward(kept, grads, needs)))


def _only(trained, number):
    """``trained`` with True instead of its tensor of this number, or of all, and False instead of the rest."""
    places = iter(range(10**6))

    def replaced(value):
        if value is None:
            return False
        if isinstance(value, torch.Tensor):
            return next(places) == number or number is None
        parts = [replaced(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else parts

    return replaced(trained)


def _detached(flat):
    return flat.structure, [t.detach() for t in flat.tensors], flat.seeds


def assert_same_bits_in_any_order(run):
    """Assert that the tensors that ``run()`` returns do not depend on the order of programs."""
    expected = run()
    for order in ORDERS:
        with faithful(order=order):
            for first, second in zip(expected, run(), strict=True):
                assert torch.equal(first, second)


def dropped(x, p, seed):
    """``x`` with its dropped elements set to zero. The factor of the other elements is applied to the sum later."""
    return x if p == 0 else torch.where(dropout_mask(*x.shape, p, seed), x, 0)


def factor(scale, p=0.0):
    """The factor by which a kernel multiplies a sum, rounded to float32."""
    return Bound.of(torch.tensor(scale * keep_scale(p), dtype=torch.float64)).round(torch.float32)


def scaled(product, scale, p=0.0):
    """``product · scale · keep_scale`` in float32."""
    number = factor(scale, p)
    return product * Bound(number.value, number.error, product.unit)


def products(dtype):
    """A function that reads the operands of a product: exactly, or as a TF32 tensor core does."""
    tf32 = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return (lambda t: Bound.of(t).tf32()) if tf32 else Bound.of
