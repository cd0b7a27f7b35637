"""The implementations that the kernels are measured against: the published SCF code, dense margin softmax and plain
PyTorch, each written from its formulas.
"""
