"""The digest of weights, by which caches know the network that made them."""

import hashlib
from collections.abc import Mapping

import torch


def digest_weights(state: Mapping[str, torch.Tensor], context: str = "") -> str:
    """Returns the SHA-256 of a state_dict, independent of the order of its keys.

    Caches store it: a change of this function makes every one of them useless.

    Args:
        state: names and values count, types and shapes only as far as they change the bytes.
        context: whatever else the digest shall depend on.
    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(context.encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
