"""A run as it lies at its output: status, bottleneck, verify, gc."""
