"""Fused operations for parameter-efficient fine-tuning: torch and Triton only, no transformers, no PEFT."""
