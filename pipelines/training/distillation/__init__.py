"""Distillation as part of a training: its config, and what it needs before the first step."""
