"""Distillation: what a student learns from a teacher beside its labels."""
