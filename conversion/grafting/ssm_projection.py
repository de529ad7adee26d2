"""Between the layer's channels and the SSM's, where the two are not the same: P of `ssm_init`."""

from collections.abc import Mapping

import torch


def inner_projection(inner: int, hidden: int, layer: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """P [inner, hidden], with orthonormal columns (inner >= hidden) or rows (inner < hidden); see `ssm_init`."""
    if inner < hidden:
        readers = torch.cat([layer["k_proj.weight"], layer["v_proj.weight"]]).double()
        return torch.linalg.svd(readers, full_matrices=True).Vh[:inner]
    rows = torch.arange(inner)
    copies = torch.bincount(rows % hidden, minlength=hidden).double()
    projection = torch.zeros(inner, hidden, dtype=torch.float64)
    projection[rows, rows % hidden] = copies[rows % hidden].rsqrt()
    return projection
