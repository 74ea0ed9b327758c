"""Objectives, advantages and the RL loop."""
