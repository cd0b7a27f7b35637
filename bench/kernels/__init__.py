"""Speed and accuracy of the kernels."""
