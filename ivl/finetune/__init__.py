"""What trains: frozen, full or LoRA per part; PEFT adapters in and out; learning rates per part."""
