"""Explanations of many images on the processes and GPUs of a Ray cluster, or of this machine."""
