"""The networks: backbones of three families, confidence nets, and the backbone frozen for inference."""
