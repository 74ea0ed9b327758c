"""Inference-time alignment: methods that tilt the samples of a policy towards a reward."""
