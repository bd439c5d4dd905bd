"""The float32 LoRA trainer for InstructBLIP: yields facts and decides nothing."""
