"""Classifiers that are ONNX files: read, run by PyTorch node by node, and compared with their file.

Shapes are computed in Python while PyTorch traces, so that the batch stays a symbol in them and no
graph computes with sizes. Converters that turn every node into a module keep shapes in tensors,
whose values torch.export does not know.
"""
