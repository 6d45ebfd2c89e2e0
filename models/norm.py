"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467), computed in the weight's dtype at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """[..., D] -> [..., D], in the input's dtype; under autocast the mean square is still taken in float32."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), tuple(self.normalized_shape), self.weight.to(dtype), self.eps).to(x.dtype)
