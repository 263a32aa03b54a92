"""LoRA adapters as PEFT stores them, for weights that they are merged into as they are read."""
