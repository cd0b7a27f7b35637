from scf_fast.config import Config
from scf_fast.networks.flops import network_counts


def flop_per_image(config: Config, network: str, z_dim: int, num_classes: int) -> int:
    """Of a training step: backward passes cost two forward ones, the margin softmax four products of an image with all
    class centers in it.

    A frozen backbone counts once an image, with a feature cache not at all.
    """
    if config.stage == "backbone":
        return 3 * network_counts(network, None, z_dim)[0] + round(config.sample_rate * 4 * 2 * num_classes * z_dim)
    backbone, _, head, _ = network_counts(network, config.confidence_net, z_dim)
    return (3 if config.finetune_bkb else 0 if config.feature_cache else 1) * backbone + 3 * head
