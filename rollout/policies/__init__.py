"""Policies: trainable generative models behind two contracts, flow and masked diffusion."""
