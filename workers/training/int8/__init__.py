"""A quantization-aware finish: training with the rounding of INT8 simulated."""
