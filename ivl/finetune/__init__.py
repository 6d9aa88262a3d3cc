"""Finetuning: frozen, full or LoRA per part; PEFT adapters; learning rates per part."""
