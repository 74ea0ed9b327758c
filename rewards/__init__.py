"""Reward functions and models, calling them safely, and what is compared with real data."""
