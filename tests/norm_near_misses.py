"""Norms that differ from the known formulas in one thing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from norm_formulas import norm


def _miss_eps_outside_root(self, x):
    h = x.float()
    return self.weight * (h / (h.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)


def _miss_eps_added_twice(self, x):
    h = x.float()
    mean = h.pow(2).mean(-1, keepdim=True) + self.eps
    return self.weight * (h * torch.rsqrt(mean + self.eps)).to(x.dtype)


def _miss_no_eps(self, x):
    h = x.float()
    return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))).to(x.dtype)


def _miss_eps_as_limit(self, x):
    h = x.float()
    mean = h.pow(2).mean(-1, keepdim=True).clamp(min=self.eps)
    return self.weight * (h * torch.rsqrt(mean)).to(x.dtype)


def _miss_maximum_of_eps(self, x):
    h = x.float()
    root = h.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(self.eps)
    return self.weight * (h / root).to(x.dtype)


def _miss_eps_times_width(self, x):
    h = x.float()
    total = h.pow(2).sum(-1, keepdim=True) + self.eps
    return self.weight * (h * torch.rsqrt(total / x.shape[-1])).to(x.dtype)


def _miss_sum_for_mean(self, x):
    h = x.float()
    return self.weight * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + self.eps)).to(x.dtype)


def _miss_divided_by_width_less_one(self, x):
    h = x.float()
    mean = h.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)
    return self.weight * (h * torch.rsqrt(mean + self.eps)).to(x.dtype)


def _miss_mean_of_magnitudes(self, x):
    h = x.float()
    return self.weight * (h / (h.abs().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def _miss_mean_over_tokens(self, x):
    h = x.float()
    return self.weight * (h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + self.eps)).to(x.dtype)


def _miss_mean_over_axis_one(self, x):
    h = x.float()
    return self.weight * (h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + self.eps)).to(x.dtype)


def _cast_mean_subtracted(self, x):
    h = x.float()
    return self.weight * self._norm(h - h.mean(-1, keepdim=True)).to(x.dtype)


def _miss_mean_subtracted_from_the_input_alone(self, x):
    h = x.float()
    root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * ((h - h.mean(-1, keepdim=True)) * root).to(x.dtype)


def _miss_mean_subtracted_from_the_variance_alone(self, x):
    h = x.float()
    variance = (h - h.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return self.weight * (h * torch.rsqrt(variance + self.eps)).to(x.dtype)


def _miss_unbiased_variance(self, x):
    h = x.float()
    h = (h - h.mean(-1, keepdim=True)) / torch.sqrt(h.var(-1, keepdim=True) + self.eps)
    return (self.weight.float() * h).to(x.dtype)


def _cast_layer_norm_rounded_before_the_weight(self, x):
    return self.weight * F.layer_norm(x, self.weight.shape, None, None, self.eps)


def _miss_layer_norm_with_the_bias_after_rounding(self, x):
    return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps) + self.weight


def _miss_layer_norm_with_offset(self, x):
    return F.layer_norm(x, self.weight.shape, self.weight + 1.0, None, self.eps)


def _miss_layer_norm_over_two_axes(self, x):
    return F.layer_norm(x, x.shape[-2:], None, None, self.eps) * self.weight


def _cast_offset_rounded_with_the_weight(self, x):
    return (self._norm(x.float()) * (1.0 + self.weight)).to(x.dtype)


def _miss_offset_on_the_result(self, x):
    return self.weight * self._norm(x.float()).to(x.dtype) + 1.0


def _miss_offset_by_a_per_mille(self, x):
    return self.weight * 1.001 * self._norm(x.float()).to(x.dtype)


def _miss_scaled_result(self, x):
    return self.weight * self._norm(x.float()).to(x.dtype) * 1.001


def _miss_scaled_input(self, x):
    return self.weight * self._norm(x.float() * 1.001).to(x.dtype)


def _miss_scaled_by_a_setting(self, x):
    return self.weight * self._norm(x.float()).to(x.dtype) * self.scale


def _miss_scaled_mean(self, x):
    h = x.float()
    mean = h.pow(2).mean(-1, keepdim=True) * 1.001
    return self.weight * (h * torch.rsqrt(mean + self.eps)).to(x.dtype)


def _cast_statistics_in_the_dtype_of_the_input(self, x):
    return self.weight * self._norm(x)


def _miss_statistics_in_float64(self, x):
    return self.weight * self._norm(x.double()).to(x.dtype)


def _cast_square_before_the_cast(self, x):
    mean = x.pow(2).float().mean(-1, keepdim=True)
    return self.weight * (x.float() * torch.rsqrt(mean + self.eps)).to(x.dtype)


def _cast_root_rounded_before_the_product(self, x):
    mean = x.float().pow(2).mean(-1, keepdim=True)
    return self.weight * (x * torch.rsqrt(mean + self.eps).to(x.dtype))


def _cast_rounded_twice(self, x):
    return (self.weight.float() * self._norm(x.float()).to(x.dtype).float() * 1.0).to(x.dtype)


def _miss_rounded_to_half(self, x):
    return self.weight * self._norm(x.float()).half().to(x.dtype)


def _cast_not_rounded(self, x):
    return self.weight.float() * self._norm(x.float())


def _miss_other_order_of_factors(self, x):
    h = x.float()
    root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
    return (h * (root * self.weight.float())).to(x.dtype)


def _miss_weight_before_the_norm(self, x):
    return self._norm(x.float() * self.weight.float()).to(x.dtype)


def _miss_weight_squared(self, x):
    return self.weight * (self.weight * self._norm(x.float()).to(x.dtype))


def _miss_weight_as_exponential(self, x):
    return torch.exp(self.weight) * self._norm(x.float()).to(x.dtype)


def _miss_without_weight(self, x):
    return self._norm(x.float()).to(x.dtype)


def _miss_residual(self, x):
    return x + self.weight * self._norm(x.float()).to(x.dtype)


def _miss_clamped_input(self, x):
    return self.weight * self._norm(x.float().clamp(-1e4, 1e4)).to(x.dtype)


def _miss_clamped_on_one_side(self, x):
    return (self.weight * self._norm(x.float()).to(x.dtype)).clamp(max=60000.0)


def _miss_without_infinities(self, x):
    return torch.nan_to_num(self.weight * self._norm(x.float()).to(x.dtype))


def _miss_magnitude(self, x):
    return self.weight * self._norm(x.float().abs()).to(x.dtype)


def _miss_other_for_negative_inputs(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return torch.where(x < -1e3, y * 0.5, y)


def _miss_cube_root(self, x):
    h = x.float()
    return self.weight * (h * (h.pow(2).mean(-1, keepdim=True) + self.eps).pow(-1 / 3)).to(x.dtype)


def _miss_power_near_half(self, x):
    h = x.float()
    return self.weight * (h * (h.pow(2).mean(-1, keepdim=True) + self.eps).pow(-0.4999)).to(x.dtype)


def _miss_power_near_two(self, x):
    h = x.float()
    mean = h.abs().pow(2.0001).mean(-1, keepdim=True)
    return self.weight * (h * torch.rsqrt(mean + self.eps)).to(x.dtype)


def _miss_dropout(self, x):
    return F.dropout(self.weight * self._norm(x.float()).to(x.dtype), 0.01, self.training)


def _miss_other_in_evaluation(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y if self.training else y * 1.01


def _miss_no_gradient_of_the_mean(self, x):
    h = x.float()
    with torch.no_grad():
        root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * (h * root).to(x.dtype)


def _miss_detached_mean(self, x):
    h = x.float()
    root = torch.rsqrt(h.detach().pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * (h * root).to(x.dtype)


def _miss_other_without_gradients(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y if torch.is_grad_enabled() else y * 1.01


def _miss_other_under_autocast(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y * 1.01 if torch.is_autocast_enabled("cpu") else y


def _miss_other_in_inference_mode(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y * 1.01 if torch.is_inference_mode_enabled() else y


def _miss_other_where_there_is_a_gpu(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y * 1.01 if torch.cuda.is_available() else y


def _miss_other_by_default_dtype(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y * 1.01 if torch.get_default_dtype() is torch.float64 else y


def _miss_depends_on_values(self, x):
    h = x.float()
    if h.abs().max() > 100:
        h = h * 0.5
    return self.weight * self._norm(h).to(x.dtype)


def _miss_depends_on_the_number_of_tokens(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y * 2.0 if x.shape[0] > 100 else y


def _miss_depends_on_the_number_of_elements(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y * 2.0 if x.numel() > 10**6 else y


def _miss_depends_on_the_device(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y * 2.0 if x.is_cuda else y


def _cast_depends_on_the_dtype(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y.clamp(-65504, 65504) if x.dtype is torch.float16 else y


def _miss_changes_its_input(self, x):
    return self.weight * self._norm(x.mul_(1.0).float()).to(x.dtype)


def _miss_counts_its_calls(self, x):
    self.calls = self.calls + 1
    return self.weight * self._norm(x.float()).to(x.dtype)


def _miss_keeps_a_list(self, x):
    self.seen.append(1)
    return self.weight * self._norm(x.float()).to(x.dtype)


def _miss_reads_a_list(self, x):
    return self.weight * self._norm(x.float()).to(x.dtype) * self.factors[0]


def _miss_returns_two(self, x):
    y = self.weight * self._norm(x.float()).to(x.dtype)
    return y, y


def _miss_needs_a_gate(self, x, gate):
    return self.weight * self._norm(x.float() * F.silu(gate.float())).to(x.dtype)


_FACTORS = [1.0]


def _miss_reads_a_list_of_its_file(self, x):
    return self.weight * self._norm(x.float()).to(x.dtype) * _FACTORS[0]


def _miss_random(self, x):
    return self.weight * self._norm(x.float() + 1e-3 * torch.randn_like(x.float())).to(x.dtype)


def _miss_raises(self, x):
    raise KeyError("gate")


def _miss_imports(self, x):
    import random

    return self.weight * self._norm(x.float()).to(x.dtype) * (1.0 if random.random() < 2 else 2.0)


def _miss_not_a_tensor(self, x):
    return math.pi


_SETTINGS = {
    "_miss_scaled_by_a_setting": {"scale": 1.001},
    "_miss_counts_its_calls": {"calls": 0},
    "_miss_keeps_a_list": {"seen": []},
    "_miss_reads_a_list": {"factors": [1.0]},
}


def _planted(prefix):
    return {
        name.removeprefix(prefix): norm(forward, **_SETTINGS.get(name, {}))
        for name, forward in globals().items()
        if name.startswith(prefix)
    }


NEAR_MISSES = _planted("_miss_")
"""Norms without a known formula in any dtype, by their difference from it."""

OTHER_CASTS = _planted("_cast_")
"""Norms with a known formula in float32, in which there are no casts, and without one in 16 bits."""
