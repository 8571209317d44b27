"""Small models with residual tails, and what it takes to tell two of them apart."""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models import SEBottleneck


def stem_and_blocks(block: type[nn.Module] = SEBottleneck) -> nn.Module:
    """A stem that is a pair, a block with a downsample branch and one without, of this project's; no ResNet."""
    torch.manual_seed(0)
    width = 8 * block.expansion
    downsample = nn.Sequential(nn.Conv2d(8, width, 1, stride=2), nn.BatchNorm2d(width))
    return drawn(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Sequential(block(8, 8, 2, downsample), block(width, 8)),
            nn.AdaptiveAvgPool2d(1),
        )
    )


# of `stem_and_blocks`: what fuse_tails swaps, the tails that run in a forward pass, its BatchNorms
PLACES, TAILS, NORMS = 3, 7, 8
SMALL = (4, 3, 12, 11)


def drawn(model: nn.Module) -> nn.Module:
    """With BatchNorms that no parameter's gradient is zero behind, and running statistics that tell them apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for t in (module.weight, module.running_mean, module.running_var):
                    if t is not None:
                        t.uniform_(0.5, 1.5, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-0.5, 0.5, generator=generator)
    return model


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def loss_of(out: Tensor) -> Tensor:
    out = out.float() if out.dtype != torch.float64 else out
    return F.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


def logits_gradients_and_buffers(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(x)
    loss_of(logits.flatten(1)).backward()
    gradients = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, **{name: b.clone() for name, b in model.named_buffers()}}


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        # a bias before a BatchNorm has a gradient of 0 and the rounding of others
        allowed = tolerance * wanted.abs().max() + 1e-12
        assert (actual[name] - wanted).abs().max() <= allowed, name


def assert_training_agrees(model: nn.Module, twin: nn.Module, steps: int = 3) -> None:
    """Steps in whatever mode the modules are in."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
    for _ in range(steps):
        assert_alike(*(logits_gradients_and_buffers(m, images(*SMALL)) for m in (model, twin)))
        for optimizer in optimizers:
            optimizer.step()
    assert_alike(model.state_dict(), twin.state_dict())


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
