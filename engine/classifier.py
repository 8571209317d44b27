"""The last layer, where it is more than ``nn.Linear``: with dropout before it, or as a cosine.

Both are an ``nn.Linear`` whose parameters keep their names, ``weight`` and ``bias``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COSINE_SCALE = 30.0


class DropoutLinear(nn.Linear):
    """``linear`` on features of which training drops each with probability ``drop``; it takes over the parameters.

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014.
    """

    def __init__(self, linear: nn.Linear, drop: float) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")  # draws no random numbers
        self.weight, self.bias = linear.weight, linear.bias
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.drop, self.training))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, drop={self.drop}"


class CosineLinear(DropoutLinear):
    """(N, in_features) features to (N, classes) logits: 30 times the cosine of features and class weight, no bias.

    Computed in float32 or wider, where bfloat16 would be off by a tenth. Source: the normalised classifier and the
    scale of Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019. The
    scale stands here and not in the loss, so that the softmax of the logits is the trained probability.
    """

    def __init__(self, linear: nn.Linear, drop: float) -> None:
        super().__init__(linear, drop)
        self.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = F.dropout(x.to(torch.promote_types(x.dtype, torch.float32)), self.drop, self.training)
            weight = self.weight.to(x.dtype)
            return COSINE_SCALE * F.linear(F.normalize(x, dim=1), F.normalize(weight, dim=1))
