"""Fused forwards over PEFT's own LoRA layers."""
