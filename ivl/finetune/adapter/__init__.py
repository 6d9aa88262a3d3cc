"""LoRA adapters: config, training, files, PEFT layout."""
