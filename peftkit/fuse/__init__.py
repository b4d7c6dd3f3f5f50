"""Fused forwards for PEFT's LoRA layers and for frozen modules around them."""
