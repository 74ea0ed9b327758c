"""Policies (what generates) and samplers (how): draws, prompts, the flow ODE/SDE sampler."""
