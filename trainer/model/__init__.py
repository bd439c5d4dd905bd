"""The frozen InstructBLIP and the adapters on it: loading, forward pass, LoRA, memory. Knows nothing of data files."""
