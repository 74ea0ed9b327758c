"""Distillation: few-step students, their teachers, and what shows that they go wrong."""
