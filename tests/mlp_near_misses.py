"""Gated MLPs that differ from the known formula in one thing."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from mlp_formulas import MLP, WIDTH, JointMLP, mlp
from torch import nn


def _miss_swapped(self, x):
    return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


def _miss_gate_twice(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.gate_proj(x))


def _miss_no_gate(self, x):
    return self.down_proj(self.act_fn(self.up_proj(x)))


def _miss_both_activated(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))


def _miss_activated_twice(self, x):
    return self.down_proj(self.act_fn(self.act_fn(self.gate_proj(x))) * self.up_proj(x))


def _miss_activation_of_the_product(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x) * self.up_proj(x)))


def _miss_activated_output(self, x):
    return self.act_fn(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


def _miss_sum_for_product(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def _miss_one_more(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


def _miss_residual(self, x):
    return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _miss_inner_residual(self, x):
    gate = self.gate_proj(x)
    return self.down_proj(self.act_fn(gate) * self.up_proj(x) + gate)


def _miss_scaled_gate(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x) * 1.001) * self.up_proj(x))


def _miss_scaled_up(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) * 0.999))


def _miss_scaled_down(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.001


def _miss_scaled_input(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x * 1.001))


def _miss_scaled_by_a_setting(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x) * self.multiplier) * self.up_proj(x))


def _miss_scaled_by_a_parameter(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.factor)


def _miss_gate_clamped_above(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=1e4)) * self.up_proj(x))


def _miss_gate_clamped_below(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x).clamp(min=-1e30)) * self.up_proj(x))


def _miss_up_clamped(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7.0, 7.0))


def _miss_both_clamped(self, x):
    gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x).clamp(-7.0, 7.0)
    return self.down_proj(self.act_fn(gate) * up)


def _miss_product_clamped(self, x):
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(torch.clamp(hidden, min=-65504.0, max=65504.0))


def _miss_clamped_by_minimum(self, x):
    gate = self.gate_proj(x)
    return self.down_proj(self.act_fn(torch.where(gate > 1e4, 1e4, gate)) * self.up_proj(x))


def _miss_without_infinities(self, x):
    return self.down_proj(torch.nan_to_num(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


def _miss_magnitude_of_gate(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x).abs()) * self.up_proj(x))


def _miss_negated_twice(self, x):
    return -self.down_proj(self.act_fn(self.gate_proj(x)) * -self.up_proj(x)) + 0.0


def _miss_normalised(self, x):
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(F.normalize(hidden, dim=-1))


def _miss_normalised_input(self, x):
    x = F.layer_norm(x, (WIDTH,))
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _miss_activation_in_float32(self, x):
    hidden = self.act_fn(self.gate_proj(x).float()) * self.up_proj(x).float()
    return self.down_proj(hidden.to(x.dtype))


def _miss_gate_in_float32(self, x):
    hidden = self.act_fn(self.gate_proj(x).float()).to(x.dtype)
    return self.down_proj(hidden * self.up_proj(x))


def _miss_sigmoid_in_steps(self, x):
    gate = self.gate_proj(x)
    return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


def _miss_steeper_sigmoid(self, x):
    gate = self.gate_proj(x)
    return self.down_proj(gate * torch.sigmoid(1.702 * gate) * self.up_proj(x))


def _miss_other_gelu(self, x):
    return self.down_proj(F.gelu(self.gate_proj(x), approximate=self.kind) * self.up_proj(x) * 1.5)


def _miss_dropout(self, x):
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(F.dropout(hidden, 0.1, self.training))


def _miss_dropout_module(self, x):
    return self.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


def _miss_tiny_dropout(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(F.dropout(x, 1e-4))) * self.up_proj(x))


def _miss_bias_after(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + self.factor


def _miss_bias_of_down_twice(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y + self.down_proj.bias


def _miss_weight_used_otherwise(self, x):
    hidden = self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x)
    return self.down_proj(hidden)


def _miss_gate_detached(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))


def _miss_gate_without_gradient(self, x):
    with torch.no_grad():
        gate = self.act_fn(self.gate_proj(x))
    return self.down_proj(gate * self.up_proj(x))


def _miss_without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _miss_changed_in_place(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)).mul_(self.up_proj(x)))


def _miss_changes_its_input(self, x):
    x += 0
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _miss_depends_on_values(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y if float(x.abs().max()) < 1e3 else torch.zeros_like(y)


def _miss_depends_on_sums(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y if x.sum().item() < 1e9 else y * 2


def _miss_depends_on_the_number_of_tokens(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y if len(x) < 1000 else y * 2


def _miss_depends_on_the_axes(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y if x.dim() < 4 else y * 2


def _miss_other_in_evaluation(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y if self.training else y * 2


def _miss_random(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y if random.random() < 2 else y * 2


def _miss_hides_what_it_reads(self, x):
    try:
        large = x.shape[0] > 1000
    except Exception:
        large = False
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y * 2 if large else y


def _miss_reads_its_attributes(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y if "multiplier" in self.__dict__ else y * 2


def _miss_reads_what_is_not_there(self, x):
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y * getattr(self, "missing", 1.0)


def _miss_two_inputs(self, x, gate):
    return self.down_proj(self.act_fn(self.gate_proj(gate)) * self.up_proj(x))


def _miss_other_input_for_up(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(torch.roll(x, 1, 0)))


def _miss_raises(self, x):
    raise LookupError("no such layer")


def _miss_joint_up_first(self, x):
    up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(self.act_fn(gate) * up)


def _miss_joint_interleaved(self, x):
    both = self.gate_up_proj(x)
    return self.down_proj(self.act_fn(both[..., ::2]) * both[..., 1::2])


def _miss_joint_overlapping(self, x):
    both, size = self.gate_up_proj(x), self.intermediate_size
    return self.down_proj(self.act_fn(both[..., 1 : size + 1]) * both[..., size:])


def _miss_joint_clamped(self, x):
    gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(self.act_fn(gate) * up.clamp(max=1e4))


def _miss_joint_activated_first(self, x):
    gate, up = self.act_fn(self.gate_up_proj(x)).chunk(2, dim=-1)
    return self.down_proj(gate * up)


def _planted():
    found = {}
    for name, forward in list(globals().items()):
        if name.startswith("_miss_"):
            short = name.removeprefix("_miss_")
            base = JointMLP if short.startswith("joint") else MLP
            found[short] = module = mlp(forward, base=base, multiplier=1.001, kind="none")
            module.factor = nn.Parameter(torch.ones(1))
            module.dropout = nn.Dropout(1e-3)
    return found


NEAR_MISSES = _planted()
"""MLPs without a known formula, by their difference from it."""
