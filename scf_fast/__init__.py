"""Train Sphere Confidence Face models: margin-softmax backbone, then a confidence network under the SCF loss."""
__version__ = "0.1.0"
