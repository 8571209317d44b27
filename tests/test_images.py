"""`prepare_images`: eager against torchvision, the backends against eager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from torch import Tensor

from engine.data.augment import Augmentation
from engine.data.torchvision_steps import prepare
from kernels import BackendUnavailable, images_triton, pack_edits, prepare_images
from kernels.images import EDIT, TONES, prepare_images_reference
from kernels.se_triton import INTERPRETED
from tests.backends import DEVICES, TAILED

pytest.importorskip("kernels._C", reason="csrc is not built", exc_type=ImportError)

IN_TRITON = TAILED[1:]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# In units of [0, 1] divided by STD, on noise: a coordinate's rounding, S float32 eps, times the steepest edge
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What a backend may be away from the float64 reference: absolutely, and for the rounding of a half type relatively."""
WIDER = 5e-5
"""Of sides up to 50: a coordinate is rounded in proportion to the side."""
S = 7


@dataclass
class Images:
    pixels: Tensor
    starts: Tensor
    sizes: Tensor

    def one(self, i: int) -> Tensor:
        """(3, H, W)"""
        H, W = self.sizes[i].tolist()
        return self.pixels[self.starts[i] :][: 3 * H * W].view(H, W, 3).permute(2, 0, 1)


def make_images(sizes: Sequence[tuple[int, int]], seed: int = 0) -> Images:
    """Noise, which is the hardest to resample, with a few bytes between the images."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3 * h * w + 5 for h, w in sizes])
    starts = 5 + lengths.cumsum(0) - lengths
    pixels = torch.randint(0, 256, (int(lengths.sum()) + 5,), dtype=torch.uint8, generator=generator)
    return Images(pixels, starts, torch.tensor(sizes, dtype=torch.int32))


SIZES = ((9, 8), (7, 7), (1, 1), (3, 11), (16, 5))
BOXES = ((0, 0, 9, 8), (0, 0, 7, 7), (0, 0, 1, 1), (1, 3, 2, 8), (2, 1, 13, 3))
INDEX = (4, 0, 2, 1, 3, 0)
WARP = ((0.8, 0.3, -0.05, -0.3, 0.9, 0.21), (-1, 0, 1, 0, 1, 0), (3, 0, -1, 0, 3, -1))
COLOR = torch.eye(3) * 0.8 + torch.tensor([[0.1, 0, 0.2], [0, 0.3, -0.1], [-0.2, 0.1, 0]])
PIVOT = torch.tensor([[0.1, 0.2, -0.1], [0.05, 0.05, 0.05], [-0.1, 0.1, 0]])
STEPS: dict[str, dict[str, Any]] = {
    "crop and resize": {},
    "warp": {"warp": WARP * 2},
    "colour": {"color": COLOR.expand(6, 3, 3), "pivot": PIVOT.expand(6, 3, 3)},
    "posterize": {"tone": [1] * 6, "level": [1, 2, 3, 4, 7, 8]},
    "solarize": {"tone": [2] * 6, "level": [0, 3.5, 100, 128, 255, 256]},
    "autocontrast": {"tone": [3] * 6},
    "equalize": {"tone": [4] * 6},
    "sharpness": {"sharpness": [0, 0.5, 2, 1.3, 1, 9]},
    "blur": {"sigma": [0.3, 0, 1.1, 0.7, 50, 1e-30]},
    "erased": {"erased": [(0, 0, 7, 7), (1, 2, 3, 1), (0, 0, 0, 0), (1, 3, 2, 1), (5, 5, 9, 9), (0, 3, 2, 4)]},
}
for tone in TONES[1:]:
    # so that no 255 x of theirs is half way between two bytes, where another rounding would be as right
    STEPS[tone]["color"] = (0.937 * torch.eye(3)).expand(6, 3, 3)
STEPS["everything"] = {
    name: value for step in ("warp", "colour", "sharpness", "blur", "erased") for name, value in STEPS[step].items()
} | {"tone": [4, 3, 2, 1, 0, 3], "level": [0, 0, 99.5, 3, 0, 0], "sigma": [0.3, 0, 1.1, 0.7, 3, 0]}


def arguments(seed: int = 0, **edits: Any) -> tuple[Tensor, ...]:
    images = make_images(SIZES, seed)
    index = torch.tensor(INDEX)
    return images.pixels, images.starts, images.sizes, index, pack_edits(6, boxes=torch.tensor(BOXES)[index], **edits)


def run(args: tuple[Tensor, ...], backend: str, dtype: torch.dtype = torch.float32, img_size: int = S) -> Tensor:
    on = [t.to(DEVICES.get(backend, "cpu")) for t in args]
    out = prepare_images(*on, img_size=img_size, mean=MEAN, std=STD, dtype=dtype, backend=backend)
    assert out.shape == (len(args[3]), 3, img_size, img_size)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    return out.cpu()


def exact(args: tuple[Tensor, ...], img_size: int = S) -> Tensor:
    return prepare_images_reference(*args, img_size, MEAN, STD, torch.float64)


def assert_prepared(actual: Tensor, expected: Tensor, backend: str = "") -> None:
    """Of float64 ``expected``."""
    relative = 0.0 if actual.dtype == torch.float32 else TOLERANCE[actual.dtype]
    if backend == "triton" and INTERPRETED and actual.dtype == torch.bfloat16:
        relative *= 2  # the interpreter cuts off where a GPU rounds
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[torch.float32], rtol=relative)


def test_eager_is_the_reference_of_the_data_engine():
    sizes = np.array([(9, 8), (23, 31), (1, 1), (5, 40), (64, 3), (12, 12)] * 2)
    images = make_images([tuple(size) for size in sizes.tolist()])
    augmentation = Augmentation(
        crop_scale=(0.2, 1.0), rotation=0.7, affine=0.7, jitter=0.7, hflip=0.5, sharpness=0.7, blur=0.7, erasing=0.5,
        sharpness_factor=2.0,
    )  # fmt: skip
    for img_size in (1, 2, 12):
        drawn = augmentation.draw(1, 2, np.arange(12), img_size=img_size, sizes=sizes)
        names = [name for name in EDIT if hasattr(drawn, name)]
        edits = pack_edits(12, **{name: getattr(drawn, name) for name in names})
        args = (images.pixels, images.starts, images.sizes, torch.arange(12), edits)
        expected = [prepare(images.one(i), img_size, drawn.boxes[i], drawn, i, mean=MEAN, std=STD) for i in range(12)]
        torch.testing.assert_close(run(args, "eager", img_size=img_size), torch.stack(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ("eager", *TAILED))
def test_tones_are_torchvisions_on_bytes(backend):
    """Exactly, where the box is as large as the square, so that its bytes are what a tone sees."""
    side = 33  # equalize has a step of several pixels
    generator = torch.Generator().manual_seed(0)
    square = torch.randint(40, 200, (3, side, side), dtype=torch.uint8, generator=generator)
    square[1] = 7
    square[2] = square[2] // 64 * 64
    assert (side * side - (square[0] == square[0].max()).sum()) // 255 > 1
    cases = [
        (TONES.index("posterize"), 3, V.posterize(square, 3)),
        (TONES.index("solarize"), 99.5, V.solarize(square, 99.5)),
        (TONES.index("autocontrast"), 0, V.autocontrast(square)),
        (TONES.index("equalize"), 0, V.equalize(square)),
    ]
    edits = pack_edits(4, boxes=[(0, 0, side, side)] * 4, tone=[c[0] for c in cases], level=[c[1] for c in cases])
    pixels = square.permute(1, 2, 0).flatten()
    tensors = (pixels, torch.tensor([0]), torch.tensor([[side, side]], dtype=torch.int32), torch.zeros(4).long(), edits)
    on = [t.to(DEVICES.get(backend, "cpu")) for t in tensors]
    out = prepare_images(*on, img_size=side, mean=(0, 0, 0), std=(1, 1, 1), dtype=torch.float32, backend=backend)
    assert not torch.equal(cases[3][2], square)
    for got, (_, _, expected) in zip(out.cpu(), cases, strict=True):
        torch.testing.assert_close(255 * got, expected.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("step", STEPS)
def test_every_step_on_the_cpu(step):
    args = arguments(**STEPS[step])
    assert_prepared(run(args, "cpu"), exact(args))


@pytest.mark.parametrize("backend", IN_TRITON)
def test_every_step_in_triton(backend):
    """One to an image, but for the last, which has them all; in the interpreter an image takes long."""
    steps = [{}, *(STEPS[name] for name in list(STEPS)[1:])]
    steps[8] = {"sigma": [50.0] * 6}
    rows = [arguments(**step)[4][3] for step in steps]
    pixels, starts, sizes, index, _ = arguments()
    args = (pixels, starts, sizes, index[3].repeat(len(rows)), torch.stack(rows))
    args[3][-2:] = 0
    args[4][-2:, :4] = torch.tensor((1, 0, 8, 5))
    expected = exact(args, 5)
    assert (expected[list(STEPS).index("erased")] == 0).sum() == 3 * 2
    assert_prepared(run(args, backend, img_size=5), expected)


@pytest.mark.parametrize("backend", IN_TRITON)
def test_a_picture_of_several_blocks_in_triton(backend, monkeypatch):
    monkeypatch.setattr(images_triton, "PIXELS", 16)
    pixels, starts, sizes, index, edits = arguments(**STEPS["everything"])
    args = (pixels, starts, sizes, index[2:4], edits[2:4])
    got, expected = run(args, backend, img_size=9), exact(args, 9)
    # a tone's rounding may fall the other way
    assert (got.double() - expected).abs().gt(WIDER).double().mean() < 0.02
    square = arguments(**STEPS["equalize"])
    args = (*square[:3], square[3][3:4], square[4][3:4])
    assert_prepared(run(args, backend), exact(args))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", TAILED)
def test_half_precision_is_rounded_once(backend, dtype):
    pixels, starts, sizes, index, edits = arguments()
    args = (pixels, starts, sizes, index[1:3], edits[1:3])
    assert_prepared(run(args, backend, dtype), exact(args), backend)


@pytest.mark.parametrize("img_size", (1, 2, 3, 17, 50))
def test_sides_around_the_vectors_of_the_processor(img_size):
    """Also of a batch whose pictures use the scratch of one another."""
    args = arguments(**STEPS["everything"] | {"tone": [0] * 6})
    torch.testing.assert_close(run(args, "cpu", img_size=img_size).double(), exact(args, img_size), atol=WIDER, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("backend", ("eager", *TAILED))
def test_numbers_that_are_none_reach_no_other_image(backend):
    plain = arguments()
    args = (*plain[:4], plain[4].clone())
    args[4][0, 4:28] = float("nan")
    args[4][1, 4:28] = float("inf")
    args[4][2, 4:28], args[4][2, 28:30] = -1e30, torch.tensor((1, float("nan")))
    args[4][3, 30:] = torch.tensor((float("nan"), float("inf"), -5, -5, 1e30, float("nan")))
    got, expected = (run(a, backend, img_size=4) for a in (args, plain))
    assert torch.equal(got[4:], expected[4:])
    assert not any(torch.equal(got[i], expected[i]) for i in range(4))


@pytest.mark.parametrize("backend", ("eager", *TAILED))
def test_a_tone_of_numbers_that_are_none(backend):
    """They count as 0, and a level that is none as no level: alike everywhere."""
    pixels, starts, sizes, index, edits = arguments()
    args = (pixels, starts, sizes, index[2:3].repeat(7), edits[2:3].repeat(7, 1))
    args[4][:4, 28] = torch.arange(1, 5)
    args[4][:4, 19] = float("nan")  # a pivot: of which red becomes none
    args[4][0, 29] = 3
    args[4][4:, 28] = 1
    args[4][4:, 29] = torch.tensor((float("nan"), float("inf"), -float("inf")))
    assert_prepared(run(args, backend, img_size=2), exact(args, 2))
    assert not exact(args, 2).isnan().any()


def test_the_number_of_threads_changes_nothing(set_threads):
    args = arguments(**STEPS["everything"])
    results = []
    for threads in (1, 2):
        set_threads(threads)
        results.append(run(args, "cpu", img_size=33))
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", TAILED)
def test_more_than_two_gigabytes(backend):
    """Before an image, and between a box and its image's first byte; only the boxes' own few bytes are ever touched."""
    start, left = 2**31 + 7, 3 * 2**28
    pixels = torch.empty(3 * left + 6, dtype=torch.uint8)
    pixels[start:][:12] = torch.arange(12, dtype=torch.uint8) * 20
    pixels[3 * left :] = torch.arange(6, dtype=torch.uint8) * 40
    sizes = torch.tensor([[2, 2], [1, left + 2]], dtype=torch.int32)
    edits = pack_edits(2, boxes=[(0, 0, 2, 2), (0, left, 1, 2)])
    args = (pixels, torch.tensor([start, 0]), sizes, torch.arange(2), edits)
    assert_prepared(run(args, backend, img_size=2), exact(args, 2))


@pytest.mark.parametrize("backend", TAILED)
def test_many_pixels_become_one_without_losing_digits(backend):
    """Added up one by one in 24 bits, these would be off by 4e-6."""
    side = 14
    pixels = torch.full((3 * side * side,), 250, dtype=torch.uint8)
    box = torch.tensor([[side, side]], dtype=torch.int32)
    args = (pixels, torch.tensor([0]), box, torch.tensor([0]), pack_edits(1, boxes=[(0, 0, side, side)]))
    torch.testing.assert_close(run(args, backend, img_size=1).double(), exact(args, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ("eager", *TAILED))
def test_empty_batch(backend):
    pixels, starts, sizes, index, edits = arguments()
    assert run((pixels, starts, sizes, index[:0], edits[:0]), backend).numel() == 0


def what_does_not_exist():
    yield "index", {"index": 5}, r"index\[1\] = 5 is none of the 5 images"
    yield "negative index", {"index": -1}, r"index\[1\] = -1"
    yield "image before the pixels", {"start": -1}, "image 0, 9 x 8 from byte -1, is not within pixels"
    yield "image behind the pixels", {"start": 10**6}, "image 0, 9 x 8 from byte 1000000"
    yield "image of no pixel", {"size": (0, 8)}, "image 0, 0 x 8"
    yield "image beyond 64 bits", {"size": (2**31 - 1, 2**31 - 1)}, "image 0, 2147483647 x 2147483647"
    yield "box outside", {"box": (1, 0, 9, 8)}, r"edits\[1\]: its box .* is not within image 0, 9 x 8"
    yield "box of no pixel", {"box": (0, 0, 0, 8)}, r"edits\[1\]: its box"
    yield "box not a number", {"box": (0, 0, float("nan"), 8)}, r"edits\[1\]: its box"
    yield "box of parts", {"box": (0.5, 0, 8, 8)}, r"edits\[1\]: its box .* whole numbers"
    yield "tone", {"tone": 5}, r"edits\[1\]: its tone 5 is none of 5"


def changed(change: dict[str, Any]) -> tuple[Tensor, ...]:
    pixels, starts, sizes, index, edits = arguments()
    if "index" in change:
        index[1] = change["index"]
    if "start" in change:
        starts[0] = change["start"]
    if "size" in change:
        sizes[0] = torch.tensor(change["size"])
    if "box" in change:
        edits[1, :4] = torch.tensor(change["box"])
    if "tone" in change:
        edits[1, 28] = change["tone"]
    return pixels, starts, sizes, index, edits


@pytest.mark.parametrize(
    ("change", "message"), [c[1:] for c in what_does_not_exist()], ids=[c[0] for c in what_does_not_exist()]
)
def test_what_does_not_exist_is_named(change, message):
    for backend in ("eager", "cpu"):
        with pytest.raises(ValueError, match=message):
            run(changed(change), backend)


@pytest.mark.parametrize("backend", IN_TRITON)
@pytest.mark.parametrize("change", [c[1] for c in what_does_not_exist()], ids=[c[0] for c in what_does_not_exist()])
def test_what_does_not_exist_is_nan_in_triton(change, backend):
    pixels, starts, sizes, index, edits = changed(change)
    out = run((pixels, starts, sizes, index[1:3], edits[1:3]), backend, img_size=2)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


def bad_calls():
    pixels, starts, sizes, index, edits = arguments()
    good = {"pixels": pixels, "starts": starts, "sizes": sizes, "index": index, "edits": edits}
    yield "pixels in floating point", good | {"pixels": pixels.float()}, "pixels must be one contiguous row of uint8"
    yield "pixels with gaps", good | {"pixels": pixels[::2]}, "pixels must be one contiguous row"
    yield "starts in 32 bits", good | {"starts": starts.int()}, r"starts must be \(5,\) of torch.int64"
    yield "sizes of other images", good | {"sizes": sizes[1:]}, r"sizes must be \(5, 2\)"
    yield "index in 32 bits", good | {"index": index.int()}, "index must be"
    yield "edits of another batch", good | {"edits": edits[1:]}, r"edits must be \(6, 36\)"
    yield "another device", good | {"edits": edits.to("meta")}, "edits is on meta, but pixels is on cpu"
    yield "no pixel", good | {"img_size": 0}, "img_size must lie between 1 and"
    yield "std of 0", good | {"std": (1, 0, 1)}, "std's above 0"
    yield "another dtype", good | {"dtype": torch.float64}, "dtype must be one of"
    yield "unknown backend", good | {"backend": "cudnn"}, "backend='cudnn'"


@pytest.mark.parametrize(("call", "message"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        prepare_images(**{"img_size": S, "mean": MEAN, "std": STD, "dtype": torch.float32} | call)


def test_edits_of_another_shape_are_named():
    with pytest.raises(ValueError, match="sigma must have 1 numbers for each of 3 images"):
        pack_edits(3, boxes=np.zeros((3, 4)), sigma=np.zeros(2))


def test_the_cuda_backend_has_no_such_operator():
    with pytest.raises(BackendUnavailable, match="prepare_images"):
        prepare_images(*arguments(), img_size=S, mean=MEAN, std=STD, dtype=torch.float32, backend="cuda")


def test_the_operator_of_csrc_refuses_what_would_not_be_memory_of_its_own():
    args, op = arguments(), torch.ops.kernels_C.prepare_images
    out = torch.empty(6, 3, S, S).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="out must be channels-last"):
        op(*args, MEAN, STD, out.contiguous())
    with pytest.raises(ValueError, match="out must have shape"):
        op(*args, MEAN, STD, out[1:])
    with pytest.raises(ValueError, match="edits must have shape"):
        op(*args[:4], args[4][:, :35], MEAN, STD, out)


def test_opcheck():
    args = arguments(**STEPS["everything"])
    torch.library.opcheck(torch.ops.kernels.prepare_images, (*args, S, MEAN, STD, torch.bfloat16, "cpu"))


def test_compiles_without_a_graph_break():
    args = arguments(**STEPS["everything"])

    def step(*tensors: Tensor) -> Tensor:
        how = {"img_size": S, "mean": MEAN, "std": STD, "dtype": torch.float32, "backend": "cpu"}
        return prepare_images(*tensors, **how) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (6, 2):
        some = (*args[:3], args[3][:B], args[4][:B])
        torch.testing.assert_close(compiled(*some), step(*some))
    torch.compiler.reset()
