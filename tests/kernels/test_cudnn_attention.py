"""Attention by cuDNN, as far as a machine without a GPU can test it: buckets of lengths, and when it is not used."""

import pytest
import torch
import torch.nn.functional as F

from peftkit_kernels.ops.attention import attention_reference, cudnn


@pytest.fixture
def lengths(monkeypatch):
    """The lengths that cuDNN would get; torch's own attention computes them."""
    seen = []

    def attend(q, k, v, scale):
        seen.append(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

    monkeypatch.setattr(cudnn, "_attend", attend)
    return seen


def _tensors(S, *, dtype=torch.float64, D=16, T=None):
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, S, 4, D), (2, T or S, 2, D), (2, T or S, 2, D))
    return [
        torch.randn(size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for size in sizes
    ]


@pytest.mark.parametrize("S", [512, 513, 700])
def test_padding_to_a_bucket_changes_nothing(lengths, S):
    qkv = _tensors(S)
    dout = torch.randn(2, S, 4, 16, generator=torch.Generator().manual_seed(1)).double()
    actual = cudnn.attend(*qkv, 0.25)
    wanted = attention_reference(*qkv, 0.25, causal=True)
    assert lengths == [-(-S // cudnn.BUCKET) * cudnn.BUCKET]
    torch.testing.assert_close(actual, wanted)
    for a, b in zip(
        torch.autograd.grad(actual, qkv, dout),
        torch.autograd.grad(wanted, qkv, dout),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(cudnn, "device_obstacle", lambda device: None)


def test_dense_causal_attention_in_16_bits_runs(hopper):
    assert cudnn.obstacle(*_tensors(512, dtype=torch.bfloat16), None, True) is None


@pytest.mark.parametrize(
    ("options", "mask", "causal", "reason"),
    [
        ({"S": 512}, True, True, "only dense causal"),
        ({"S": 512}, False, False, "only dense causal"),
        ({"S": 512, "dtype": torch.float32}, False, True, "its input is torch.float32"),
        ({"S": 511}, False, True, "511 queries"),
        ({"S": 512, "T": 600}, False, True, "600 keys"),
        ({"S": 512, "D": 12}, False, True, "head size is 12"),
        ({"S": 512, "D": 192}, False, True, "head size is 192"),
    ],
)
def test_what_torch_computes_itself(hopper, options, mask, causal, reason):
    qkv = _tensors(**{"dtype": torch.bfloat16, **options})
    found = cudnn.obstacle(*qkv, torch.ones(1) if mask else None, causal)
    assert reason in found


def test_the_users_settings_win(hopper, monkeypatch):
    qkv = _tensors(512, dtype=torch.bfloat16)
    for name, reason in (
        ("cudnn_sdp_enabled", "switched off"),
        ("flash_sdp_enabled", "another attention was asked for"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(torch.backends.cuda, name, lambda: False)
            assert reason in cudnn.obstacle(*qkv, None, True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "switched off" in cudnn.obstacle(*qkv, None, True)
    order = [torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION]
    order += [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]
    with torch.nn.attention.sdpa_kernel(order, set_priority=True):
        assert "another order" in cudnn.obstacle(*qkv, None, True)
    # torch does this itself on some GPUs, in its first attention
    with torch.nn.attention.sdpa_kernel(order[::-1], set_priority=True):
        assert cudnn.obstacle(*qkv, None, True) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in cudnn.obstacle(*qkv, None, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert cudnn.obstacle(*qkv, None, True) is None


def test_a_cpu_is_not_a_gpu():
    assert "not an NVIDIA GPU" in cudnn.device_obstacle(torch.device("cpu"))
