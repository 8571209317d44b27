"""Temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.inference_mode(False)
@torch.enable_grad()
def fit_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The T above 0 at which softmax(logits / T) has the least cross-entropy, in float64 on the CPU.

    None where there is none: every label has the largest logit, so that the loss falls for ever as T does; or the
    labels' logits are on average no larger than the others', so that it falls for ever as T grows.

    Args:
        logits: (N, classes), finite, of images that the weights were not trained on.
        labels: (N,) integers.
    """
    # copies: what was made in inference mode has no gradient
    logits, labels = logits.detach().cpu().double().clone(), labels.detach().cpu().long().clone()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    if bool((own == logits.amax(dim=1)).all()) or bool(own.mean() <= logits.mean()):
        return None
    # The loss is convex in 1/T, not in T, and steps of log T cannot leave what is above 0.
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_temperature], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_temperature.exp().item()
