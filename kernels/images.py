"""`prepare_images`: from decoded images to a batch that a model takes, augmented, as one operator.

All images lie one behind the other in one tensor of bytes. For each of a batch the operator cuts a box out of its
image, and with S = img_size makes of it a square of S x S pixels x, RGB in [0, 1], by these steps, in float32, of which
those that change nothing are left out:

resize      antialiased and bilinear, as ATen's: along each axis, of a box of n pixels, output i is the mean of the
            pixels j weighted by max(0, 1 - |j + 1/2 - c| / r), where c = (i + 1/2) n / S and r = max(1, n / S); the
            weights are of the box's pixels alone, and sum to 1
warp        the output pixel whose centre is at (u, v), in fractions of the side, shows what is at
            (a u + b v + c, d u + e v + f): four pixels, bilinearly, black outside
colour      y = clamp(color x + pivot mean(x), 0, 1), with mean(x) the square's mean pixel
tone        on q = round(255 x), half to even, and back to q / 255: of `TONES`, as torchvision does it on bytes
              posterize     the highest ``level`` bits of q
              solarize      255 - q where q >= level
              autocontrast  255 (q - min) / (max - min), rounded down, of each channel's minimum and maximum
              equalize      with n(v) the channel's pixels below v and step = (S S - those of its largest value) / 255,
                            rounded down: min(255, (n(q) + step / 2) / step), rounded down, and q where step is 0
sharpness   f x + (1 - f) k * x, clamped to [0, 1], with k = [1 1 1; 1 5 1; 1 1 1] / 13, but for the border pixels,
            which stay
blur        Gaussian, its window of min(ceil(3 sigma), S - 1) pixels to each side, reflected at the border
normalise   (x - mean) / std by channel
erase       a box of the square becomes 0

and rounds once, to dtype. The steps are those of torchvision.transforms.v2 of the same names.

Everything about an image of the batch is in one row of 36 numbers, its edit (`EDIT`), so that it travels in one copy.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backends import resolve_backend
from kernels.registration import register

EDIT = {
    "boxes": 4,  # top, left, height, width of what is shown, in pixels of the image; whole numbers
    "warp": 6,  # a, b, c, d, e, f
    "color": 9,  # row by row
    "pivot": 9,
    "tone": 1,  # a place in `TONES`
    "level": 1,
    "sharpness": 1,  # f: 1 changes nothing
    "sigma": 1,  # in pixels of the square; 0: no blur
    "erased": 4,  # top, left, height, width in the square
}
"""The columns of an edit, in this order, by how many numbers each has."""
COLUMNS = sum(EDIT.values())
TONES = ("nothing", "posterize", "solarize", "autocontrast", "equalize")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 1 << 14  # img_size: within a picture the kernels count in 32 bits
IDENTITY = {
    "warp": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "color": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    "sharpness": (1.0,),
}
"""The columns that are not zeros where nothing happens."""


def pack_edits(
    n: int,
    *,
    boxes: Any,
    warp: Any = None,
    color: Any = None,
    pivot: Any = None,
    tone: Any = None,
    level: Any = None,
    sharpness: Any = None,
    sigma: Any = None,
    erased: Any = None,
) -> Tensor:
    """(n, 36) float32 on the CPU: what happens to n images, of arrays or tensors; what is not given changes nothing.

    Args:
        boxes, erased: (n, 4).
        warp: (n, 2, 3) or (n, 6).
        color, pivot: (n, 3, 3) or (n, 9).
        tone, level, sharpness, sigma: (n,).

    Raises:
        ValueError: an argument of another shape.
    """
    given = dict(zip(EDIT, (boxes, warp, color, pivot, tone, level, sharpness, sigma, erased), strict=True))
    edits = torch.zeros((n, COLUMNS))
    for (name, value), columns in zip(given.items(), edits.split(list(EDIT.values()), dim=1), strict=True):
        if value is None:
            columns.copy_(torch.tensor(IDENTITY.get(name, (0.0,) * EDIT[name])))
            continue
        values = torch.as_tensor(value)
        if values.dim() == 0 or len(values) != n or values.numel() != n * EDIT[name]:
            raise ValueError(
                f"{name} must have {EDIT[name]} numbers for each of {n} images, got shape {tuple(values.shape)}"
            )
        columns.copy_(values.reshape(n, EDIT[name]))
    return edits


def prepare_images(
    pixels: Tensor,
    starts: Tensor,
    sizes: Tensor,
    index: Tensor,
    edits: Tensor,
    *,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """The images ``index`` as a batch: cut out, resized, augmented, normalised.

    Args:
        pixels: (bytes,) uint8, the images one behind the other, each (H, W, 3), RGB; more than 2^31 bytes are fine.
        starts: (n,) int64, of each image its first byte in ``pixels``.
        sizes: (n, 2) int32, of each image its height and width.
        index: (B,) int64, which images.
        edits: (B, 36) float32, what happens to each (`EDIT`, `pack_edits`).
        img_size: the side of the result, in pixels; at most 16384.
        mean, std: of each channel, on the scale of 0 to 1.
        dtype: float32, bfloat16 or float16.
        backend: "auto", or one of `available_backends` but "cuda", which has no such operator.

    Returns:
        (B, 3, img_size, img_size) of ``dtype``, channels-last, on the device that all the tensors are on.

    Raises:
        ValueError: a shape, dtype, layout, device or name that does not fit; an index, image, box or tone that does not
            exist. The "triton" backend, to see that, would have to wait for the device: there an image of which one of
            these four does not exist comes out as NaN.
        BackendUnavailable: the named backend cannot serve here.
    """
    _check(pixels, starts, sizes, index, edits, img_size, mean, std, dtype)
    chosen = resolve_backend(backend, pixels.device, dtype, operator="prepare_images")
    numbers = [float(v) for v in mean], [float(v) for v in std]
    if chosen == "eager":
        return prepare_images_reference(pixels, starts, sizes, index, edits, img_size, *numbers, dtype)
    out: Tensor = _call(pixels, starts, sizes, index, edits, img_size, *numbers, dtype, chosen)
    return out


def _check(
    pixels: Tensor,
    starts: Tensor,
    sizes: Tensor,
    index: Tensor,
    edits: Tensor,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> None:
    n, B = starts.shape[:1].numel(), index.shape[:1].numel()
    wanted = {
        "starts": (starts, (n,), torch.int64),
        "sizes": (sizes, (n, 2), torch.int32),
        "index": (index, (B,), torch.int64),
        "edits": (edits, (B, COLUMNS), torch.float32),
    }
    if pixels.dim() != 1 or pixels.dtype != torch.uint8 or not pixels.is_contiguous():
        raise ValueError(
            f"pixels must be one contiguous row of uint8, got {tuple(pixels.shape)} with strides {pixels.stride()} of "
            f"{pixels.dtype}"
        )
    for name, (t, shape, kind) in wanted.items():
        if t.shape != shape or t.dtype != kind:
            raise ValueError(f"{name} must be {shape} of {kind}, got {tuple(t.shape)} of {t.dtype}")
        if t.device != pixels.device:
            raise ValueError(f"{name} is on {t.device}, but pixels is on {pixels.device}")
    if not 1 <= img_size <= LARGEST:
        raise ValueError(f"img_size must lie between 1 and {LARGEST}, got {img_size}")
    if len(mean) != 3 or len(std) != 3 or not all(v > 0 for v in std):
        raise ValueError(f"mean and std must be three numbers each, std's above 0, got {(*mean,)} and {(*std,)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")


def prepare_images_reference(
    pixels: Tensor,
    starts: Tensor,
    sizes: Tensor,
    index: Tensor,
    edits: Tensor,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """The same in plain PyTorch, an image at a time; arguments of `prepare_images`. In float64 where dtype is that."""
    shape = (len(index), 3, img_size, img_size)
    out = torch.empty(shape, dtype=dtype, device=pixels.device, memory_format=torch.channels_last)
    wide = torch.promote_types(dtype, torch.float32)
    where = list(zip(starts.tolist(), sizes.tolist(), strict=True))
    for i, (which, row) in enumerate(zip(index.tolist(), edits.cpu(), strict=True)):
        edit = dict(zip(EDIT, (part.tolist() for part in row.split(list(EDIT.values()))), strict=True))
        box = _find(i, which, where, edit, pixels)
        out[i] = _picture(box.to(wide), edit, img_size, mean, std)
    return out


def _find(i: int, which: int, where: list[Any], edit: dict[str, list[float]], pixels: Tensor) -> Tensor:
    """The box that edit ``i`` shows of its image, (3, h, w) uint8; raises ValueError where there is none."""
    if not 0 <= which < len(where):
        raise ValueError(f"index[{i}] = {which} is none of the {len(where)} images")
    start, (H, W) = where[which]
    if H < 1 or W < 1 or not 0 <= start <= pixels.numel() - 3 * H * W:
        raise ValueError(f"image {which}, {H} x {W} from byte {start}, is not within pixels, {pixels.numel()} bytes")
    top, left, h, w = edit["boxes"]
    if not (top >= 0 and left >= 0 and h >= 1 and w >= 1 and top + h <= H and left + w <= W):
        raise ValueError(f"edits[{i}]: its box {edit['boxes']} is not within image {which}, {H} x {W}")
    if not all(side.is_integer() for side in edit["boxes"]):
        raise ValueError(f"edits[{i}]: its box {edit['boxes']} is not of whole numbers")
    if edit["tone"][0] not in range(len(TONES)):
        raise ValueError(f"edits[{i}]: its tone {edit['tone'][0]:g} is none of {len(TONES)}")
    image = pixels[start : start + 3 * H * W].view(H, W, 3)
    return image[int(top) : int(top + h), int(left) : int(left + w)].permute(2, 0, 1)


def _picture(
    box: Tensor, edit: dict[str, list[float]], img_size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """(3, h, w) floating point, 0 to 255 -> (3, img_size, img_size)."""
    x = F.interpolate(box[None] / 255, (img_size, img_size), mode="bilinear", antialias=True)[0]
    if tuple(edit["warp"]) != IDENTITY["warp"]:
        x = _warp(x, edit["warp"])
    if tuple(edit["color"]) != IDENTITY["color"] or any(edit["pivot"]):
        color, pivot = (x.new_tensor(edit[name]).view(3, 3) for name in ("color", "pivot"))
        shift = pivot @ x.mean((1, 2))
        x = (torch.einsum("ij,jhw->ihw", color, x) + shift[:, None, None]).clamp(0, 1)
    if edit["tone"][0]:
        x = _tone(x, TONES[int(edit["tone"][0])], edit["level"][0])
    if edit["sharpness"][0] != 1 and img_size > 2:
        x = _sharpen(x, edit["sharpness"][0])
    if edit["sigma"][0] > 0:
        x = _blur(x, edit["sigma"][0])
    x = (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
    top, left, h, w = edit["erased"]
    rows, columns = (torch.arange(img_size, device=x.device) for _ in range(2))
    erased = ((rows >= top) & (rows < top + h))[:, None] & (columns >= left) & (columns < left + w)
    return torch.where(erased, 0, x)


def _warp(x: Tensor, warp: list[float]) -> Tensor:
    S = x.shape[-1]
    centres = (torch.arange(S, dtype=x.dtype, device=x.device) + 0.5) / S
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    a, b, c, d, e, f = warp
    # grid_sample's coordinates go from -1 to 1
    grid = 2 * torch.stack((a * u + b * v + c, d * u + e * v + f), dim=-1) - 1
    return F.grid_sample(x[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def _tone(x: Tensor, tone: str, level: float) -> Tensor:
    q = (255 * x).nan_to_num(0).round().clamp(0, 255)
    if tone == "posterize":
        kept = 1 << (8 - int(min(max(0.0, level), 8.0)))  # in this order 0 where the level is not a number
        q = (q / kept).floor() * kept
    elif tone == "solarize":
        q = torch.where(q >= level, 255 - q, q)
    elif tone == "autocontrast":
        low, high = q.amin((1, 2), keepdim=True), q.amax((1, 2), keepdim=True)
        # in float32 and with these roundings, as torchvision does it: then rounding down gives what it does
        span = ((high - low).float() * (1 / 255)).to(q.dtype)
        stretched = ((q - low).float() / span.float()).floor().clamp(0, 255).to(q.dtype)
        q = torch.where(high > low, stretched, q)
    else:
        q = torch.stack([_equalize(channel) for channel in q.long()]).to(x.dtype)
    return q / 255


def _equalize(q: Tensor) -> Tensor:
    counts = torch.bincount(q.flatten(), minlength=256)
    step = (q.numel() - counts[q.max()]) // 255
    below = counts.cumsum(0) - counts
    return torch.where(step > 0, ((below + step // 2) // step.clamp(min=1)).clamp(max=255)[q], q)


def _sharpen(x: Tensor, factor: float) -> Tensor:
    kernel = x.new_ones(3, 3)
    kernel[1, 1] = 5
    smooth = F.conv2d(x[:, None], kernel[None, None] / 13)[:, 0]
    inside = x[:, 1:-1, 1:-1]
    x = x.clone()
    x[:, 1:-1, 1:-1] = inside + (1 - factor) * (smooth - inside)
    return x.clamp(0, 1)


def _blur(x: Tensor, sigma: float) -> Tensor:
    # 3 sigma in float32, so that every backend takes the same window
    three = float(torch.tensor(sigma, dtype=torch.float32) * 3)
    radius = math.ceil(min(three, x.shape[-1] - 1))
    distance = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.softmax(-((distance / sigma) ** 2) / 2, dim=0)
    x = F.pad(x[None], (radius,) * 4, mode="reflect")[0] if radius else x
    x = F.conv2d(x[:, None], weights.view(1, 1, -1, 1))
    return F.conv2d(x, weights.view(1, 1, 1, -1))[:, 0]


def backend_module(backend: str) -> ModuleType:
    """kernels.images_cpu or kernels.images_triton, imported when it is first used."""
    return importlib.import_module(f"kernels.images_{backend}")


def _prepare(
    pixels: Tensor,
    starts: Tensor,
    sizes: Tensor,
    index: Tensor,
    edits: Tensor,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Any:
    out = _fake(pixels, starts, sizes, index, edits, img_size, mean, std, dtype)
    if len(index):
        small = (t.contiguous() for t in (starts, sizes, index, edits))
        backend_module(backend).prepare_images(pixels, *small, list(mean), list(std), out)
    return out


def _fake(pixels: Tensor, starts: Tensor, sizes: Tensor, index: Tensor, edits: Tensor, img_size: int, *how: Any) -> Any:
    shape = (index.shape[0], 3, img_size, img_size)
    return torch.empty(shape, dtype=how[2], device=pixels.device, memory_format=torch.channels_last)


_call: Any = register(
    "prepare_images(Tensor pixels, Tensor starts, Tensor sizes, Tensor index, Tensor edits, int img_size, float[] mean,"
    " float[] std, ScalarType dtype, str backend) -> Tensor out",
    _prepare,
    _fake,
)
