"""Processes: CLI, launch, Ray actor pools, DeepSpeed learner ranks, weights, checkpoints, tracking."""
