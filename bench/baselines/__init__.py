"""What the kernels are measured against, each written from published formulas: the published SCF loss and plain
PyTorch.
"""
