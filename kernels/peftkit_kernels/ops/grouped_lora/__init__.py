"""Low-rank updates of many adapters in one batch; each row has its own adapter."""

from peftkit_kernels.ops.grouped_lora.op import grouped_lora
from peftkit_kernels.ops.grouped_lora.plan import GroupPlan, plan_groups
from peftkit_kernels.ops.grouped_lora.reference import grouped_lora_reference

__all__ = ["GroupPlan", "grouped_lora", "grouped_lora_reference", "plan_groups"]
