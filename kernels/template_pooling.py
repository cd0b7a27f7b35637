"""Confidence-weighted pooling of the images of a template into one direction and one concentration.

    s_t = sum over images m of template t of kappa_m mu_m,    direction_t = s_t / |s_t|,    kappa_t = |s_t|
"""

import torch


def pool_templates(
    mu: torch.Tensor, kappa: torch.Tensor | None, template_ids: torch.Tensor, num_templates: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools image directions into templates of any size. Source: Eqn (14), Li et al., CVPR 2021.

    CPU and CUDA tensors run the same PyTorch code: rows sorted by template (stably), then one segmented sum, which unlike atomic
    additions gives the same bits on every run.

    Args:
        mu: (N, D) floating point, unit rows.
        kappa: (N,) floating point weights >= 0; None weighs every image alike (average pooling).
        template_ids: (N,) int64 in [0, T), in any order.
        num_templates: T >= 1; by default the largest id plus one.
    Returns:
        directions (T, D) and kappas (T,), summed in mu's dtype (at least float32). A template without images, or whose images
        cancel exactly, has direction 0 and kappa 0: the uniform distribution. Differentiable in mu and kappa. Deterministic.
    Raises:
        ValueError: shapes or dtypes are not as above, an id lies outside [0, T), or T is 0.
    """
    if mu.ndim != 2 or not mu.is_floating_point():
        raise ValueError(f"mu must be (N, D) floating point, got {tuple(mu.shape)} {mu.dtype}")
    if kappa is not None and (kappa.shape != mu.shape[:1] or not kappa.is_floating_point()):
        raise ValueError(f"kappa must be ({len(mu)},) floating point, one per row of mu, or None, got {tuple(kappa.shape)} {kappa.dtype}")
    if template_ids.shape != mu.shape[:1] or template_ids.dtype != torch.int64:
        got = f"{tuple(template_ids.shape)} {template_ids.dtype}"
        raise ValueError(f"template_ids must be ({len(mu)},) int64, one per row of mu, got {got}")
    lowest, highest = (int(template_ids.min()), int(template_ids.max())) if len(mu) else (0, -1)
    if num_templates is None:
        num_templates = highest + 1
    if num_templates < 1:
        raise ValueError(f"there must be at least one template, got {num_templates}; pass images or num_templates")
    if lowest < 0 or highest >= num_templates:
        raise ValueError(f"template_ids must lie in [0, {num_templates}), got {lowest}..{highest}; "
                         "number them with torch.unique(return_inverse=True)")
    weighted = mu.to(torch.promote_types(mu.dtype, torch.float32))
    if kappa is not None:
        weighted = weighted * kappa.to(weighted.dtype)[:, None]
    order = torch.argsort(template_ids, stable=True)
    lengths = torch.bincount(template_ids, minlength=num_templates)
    sums = torch.segment_reduce(weighted[order], "sum", lengths=lengths, axis=0, initial=0.0)
    kappas = torch.linalg.vector_norm(sums, dim=1)
    return sums / kappas.clamp(min=torch.finfo(sums.dtype).tiny)[:, None], kappas
