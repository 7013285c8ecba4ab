"""Explanations from NVIDIA's Triton Inference Server: its models, and what reads their requests."""
