"""What a training run can be told: one dataclass, from which the flags and the recipe keys are made.

Defaults are overridden by a recipe (YAML, keys as the fields below), and a recipe by the command line. The resolved
whole is written to the run's ``args.yaml``, which is itself a recipe.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from engine.config_values import checked_values
from engine.data.augment import AUTO_AUGMENTS
from engine.data.backends import DATA_BACKENDS
from engine.data.held_out import DUPLICATES, TEST_METHODS
from engine.data.sampler import EPOCH_SIZES, SAMPLINGS
from engine.errors import UserError
from engine.image_flags import WORDS
from engine.metrics import METRIC_NAMES
from engine.models import MODEL_NAMES, require_known

PROBABILITIES = (
    *("aug_prob", "hflip", "vflip", "color_jitter_prob", "sharpness_prob", "gaussian_blur_prob", "reprob"),
    *("minority_aug", "mixup_prob", "mixup_switch_prob"),
)
SELECT_ON = {"validation": "val", "test": "test"}
"""What the best epoch can be chosen on, and how the columns of summary.csv with its figures begin."""
CLASS_WEIGHTS = ("none", "balanced", "sqrt", "effective")


def _flag(default: Any, help: str, *, short: str | None = None, **argument: Any) -> Any:
    """A field that is also a flag; ``argument`` goes to ``add_argument``."""
    return dataclasses.field(default=default, metadata={"help": help, "short": short, "argument": argument})


@dataclasses.dataclass
class Config:
    """One training run, resolved. Field names are the flags' with underscores."""

    data_dir: str | None = _flag(
        None,
        "folder with train/CLASS/* or CLASS/*, CIFAR's files or an NPZ file; the embedded digits without it",
        type=str,
    )
    csv: str | None = _flag(
        None, "manifest of the training images, CSV or Parquet, columns filename,label; with split, of all", type=str
    )
    val_csv: str | None = _flag(None, "manifest of the validation images", type=str)
    test_csv: str | None = _flag(None, "manifest of the test images", type=str)
    allow_links: bool = _flag(False, "follow links that lead out of --data-dir", switch=True)
    classes: tuple[str, ...] = _flag((), WORDS["classes"], names=True)
    exclude: tuple[str, ...] = _flag((), WORDS["exclude"], names=True, metavar="PATTERN")
    label_regex: str | None = _flag(None, WORDS["label_regex"], type=str)
    group_regex: str | None = _flag(None, WORDS["group_regex"], type=str)
    group_duplicates: str = _flag("none", WORDS["group_duplicates"], choices=DUPLICATES)
    test_fraction: float = _flag(
        0.0, "share of each training class held out for testing where no test images are given", type=float
    )
    test_method: str = _flag(
        "stratified", "which those are: by chance; or first, the first ones by name", choices=tuple(TEST_METHODS)
    )
    val_fraction: float = _flag(
        0.15, "share of each training class held out for validation where none is given", type=float
    )
    imbalance_ratio: float | None = _flag(
        None,
        "make train, and a validation set that is taken from it, long-tailed: of k classes, class x = 0, 1, ... keeps "
        "n * U^(x/(k-1)) images, where U is this",
        type=float,
    )
    folds: int | None = _flag(
        None, "divide all but the data's own test images into so many folds, and test on --fold", type=int
    )
    fold: int | None = _flag(None, "number of the fold to test on, from 0", type=int)
    max_bad_fraction: float = _flag(0.01, "largest share of unreadable images that a run accepts", type=float)
    num_classes: int | None = _flag(None, "number of classes; must be what the data holds", type=int)

    model: str = _flag("seresnet50", f"one of {', '.join(MODEL_NAMES)}; or timm:NAME, any model of timm", type=str)
    pretrained: bool = _flag(
        False, "start from torchvision's ImageNet weights, or timm's (downloaded by either)", switch=True
    )
    pretrained_path: str | None = _flag(
        None, "start from a weight file of torchvision or timm (.pth, .safetensors)", type=str
    )
    fused_se: bool = _flag(False, "use the fused operators; the checkpoint is the same either way", switch=True)
    fused_scope: str = _flag(
        "tail",
        "what --fused-se fuses: tail, BatchNorm with the SE, addition and ReLU behind it; block, the SE modules alone",
        choices=("block", "tail"),
    )
    channels_last: bool = _flag(True, "keep activations channels-last", switch=True)
    drop: float = _flag(0.0, "probability of dropping a feature before the classifier", type=float)

    freeze_until: str | None = _flag(
        None, "freeze this layer and all before it, such as layer2: no gradient, BatchNorm as in evaluation", type=str
    )
    freeze: tuple[str, ...] = _flag((), "freeze these layers or parameters, such as conv1 bn1 layer1.0", names=True)
    unfreeze_epochs: int | None = _flag(
        None, "let a frozen stage go each time after so many epochs, from the last one to the stem", type=int
    )

    heads: dict[str, dict[str, Any]] = dataclasses.field(
        default_factory=dict, metadata={"help": "several classifiers in place of one", "recipe_only": True}
    )

    img_size: int = _flag(224, "height and width that images are resized to, in pixels", type=int)
    train_img_sizes: tuple[int, ...] = _flag(
        (),
        "sizes to train on one after the other, such as 128 160 192, each for as many epochs, or for one epoch more; "
        "scoring is at --img-size, and without this flag so is training",
        nargs="+",
        type=int,
    )
    batch_size: int = _flag(32, "images a step", short="-b", type=int)
    sampling: str = _flag(
        "inverse",
        "weight by which an image is drawn, of the number c of images in its class: none, 1; inverse, 1/c; sqrt, "
        "1/sqrt(c); power, 1/c^alpha; effective, (1-beta)/(1-beta^c); or column: the manifest's column 'weight'",
        choices=SAMPLINGS,
    )
    sampling_alpha: float = _flag(0.5, "exponent of --sampling power", type=float)
    sampling_beta: float = _flag(0.999, "beta of --sampling effective", type=float)
    epoch_size: str = _flag(
        "data",
        "images an epoch draws: data, as many as there are; over (oversampling), so many that each is expected at "
        "least once; under (undersampling), so many that none is expected more than once",
        choices=EPOCH_SIZES,
    )
    replacement: bool | None = _flag(None, "draw with replacement; by default unless --sampling is none", switch=True)
    crop_pct: float | None = _flag(
        None,
        "show, for scoring, the central square of this share of the shorter side; by default all, stretched",
        type=float,
    )
    scale: tuple[float, float] = _flag(
        (1.0, 1.0), "share of an image's area that a random resized crop shows, from and to; 1 1: no crop", nargs=2
    )
    ratio: tuple[float, float] = _flag(
        (0.75, 4 / 3), "width over height of a random resized crop, from and to", nargs=2
    )
    aug_prob: float = _flag(
        0.3, "probability of each of rotation, affine and colour jitter; 0 turns them off", type=float
    )
    hflip: float = _flag(0.3, "probability of a horizontal flip", type=float)
    vflip: float = _flag(0.0, "probability of a vertical flip", type=float)
    degrees: float = _flag(15.0, "largest rotation to either side", type=float)
    translate: float = _flag(0.1, "largest shift of the affine along x and y, as a share of the side", type=float)
    zoom: tuple[float, float] = _flag((0.9, 1.1), "zoom factor of the affine, from and to", nargs=2)
    shear: float = _flag(10.0, "largest shear of the affine along x, in degrees to either side", type=float)
    color_jitter: tuple[float, float, float, float] = _flag(
        (0.2, 0.2, 0.2, 0.05), "largest change of brightness, contrast, saturation and hue", nargs=4
    )
    color_jitter_prob: float | None = _flag(None, "probability of colour jitter; --aug-prob by default", type=float)
    sharpness: float = _flag(1.2, "factor of the sharpness: 0 smooths, 1 changes nothing, 2 sharpens", type=float)
    sharpness_prob: float = _flag(0.0, "probability of a change of sharpness", type=float)
    gaussian_blur_prob: float = _flag(0.0, "probability of a Gaussian blur", type=float)
    reprob: float = _flag(0.0, "probability of random erasing", type=float)
    minority_aug: float = _flag(
        0.0,
        "raise the probabilities p above for rarer classes, up to p + this * (1 - p) for the rarest",
        type=float,
    )
    aa: str = _flag(
        "none",
        "trivial: one more operation for every image, of TrivialAugment's 14, in one of its 31 strengths",
        choices=AUTO_AUGMENTS,
    )

    epochs: int = _flag(50, "epochs to train", type=int)
    opt: str = _flag(
        "adamw",
        "sgd (with Nesterov's momentum), momentum (with the plain one), adam and adamw are torch's fused ones; "
        "fusedsgd and fusedadamw NVIDIA Apex's",
        choices=("sgd", "momentum", "adam", "adamw", "fusedsgd", "fusedadamw"),
    )
    lr: float = _flag(5e-4, "peak learning rate", type=float)
    momentum: float = _flag(0.9, "momentum of SGD", type=float)
    weight_decay: float = _flag(0.05, "weight decay, of everything but biases and norms", type=float)
    decay_all: bool = _flag(False, "decay biases and norms too, as torch's optimizers do by themselves", switch=True)
    layer_decay: float = _flag(
        1.0, "factor of the learning rate from each stage to the one before it: head, layer4, ..., stem", type=float
    )
    sched: str = _flag("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup_epochs: int = _flag(3, "epochs of linear warm-up", type=int)
    min_lr: float = _flag(1e-6, "learning rate that the cosine ends at", type=float)
    loss: str = _flag(
        "cross-entropy",
        "what is minimised; ldam also makes the classifier a cosine one, and logit-adjustment with --tau 1 is the "
        "balanced softmax",
        choices=("cross-entropy", "focal", "ldam", "logit-adjustment"),
    )
    focal_gamma: float = _flag(2.0, "exponent of --loss focal", type=float)
    tau: float = _flag(1.0, "factor of --loss logit-adjustment", type=float)
    l2_loss: float = _flag(0.0, "add half of this times the sum of squares of all parameters to the loss", type=float)
    smoothing: float | None = _flag(
        None, "label smoothing; by default 0.1 with --loss cross-entropy, else 0 as in the papers", type=float
    )
    mixup: float = _flag(0.0, "alpha of MixUp; 0: off", type=float)
    cutmix: float = _flag(0.0, "alpha of CutMix; 0: off", type=float)
    mixup_prob: float = _flag(1.0, "probability that a batch is mixed, where --mixup or --cutmix is on", type=float)
    mixup_switch_prob: float = _flag(0.5, "probability of CutMix for a mixed batch, where both are on", type=float)
    class_weights: str | tuple[float, ...] = _flag(
        "none",
        "weigh the loss of a class of c images: balanced, by 1/c as scikit-learn does; sqrt, by 1/sqrt(c); effective, "
        "by (1-beta)/(1-beta^c); or by numbers, one a class in sorted order",
        words=CLASS_WEIGHTS,
    )
    class_weights_beta: float = _flag(0.999, "beta of --class-weights effective", type=float)
    drw_epoch: int = _flag(0, "epoch that --class-weights begin with (deferred re-weighting)", type=int)
    model_ema: bool = _flag(
        False, "score and keep an exponential moving average of the weights in place of the weights", switch=True
    )
    model_ema_decay: float = _flag(0.9998, "share of the average that a step keeps", type=float)
    model_ema_warmup: bool = _flag(
        False, "keep less in the first steps: 1 - (1 + n)^(-2/3) after n of them", switch=True
    )
    clip_grad: float | None = _flag(None, "largest norm of the gradient", type=float)
    grad_accum_steps: int = _flag(1, "batches whose gradients are added up before a step", type=int)
    amp: bool | None = _flag(
        None, "mixed precision; by default where the hardware computes in the half type natively", switch=True
    )
    amp_dtype: str = _flag("bfloat16", "half type of mixed precision", choices=("bfloat16", "float16"))

    eval_metric: str = _flag(
        "macro_f1", f"chooses the best epoch on the images of --select-on: {', '.join(METRIC_NAMES)}", type=str
    )
    select_on: str = _flag(
        "validation",
        "images that the best epoch is chosen on; with test the figures are optimistic, which is then said, and no "
        "validation images are taken from train",
        choices=tuple(SELECT_ON),
    )
    sensitivity: tuple[float, ...] = _flag(
        (),
        "report the specificity at these sensitivities of the positive class, of more than two of each; the thresholds "
        "are chosen on the validation images",
        nargs="+",
    )
    early_stopping_patience: int | None = _flag(
        None, "stop after this many epochs without a better --eval-metric", type=int
    )
    keep_epochs: bool = _flag(False, "keep the weights of every epoch in epochs/", switch=True)
    output: str | None = _flag(None, "run directory to make; output/train/<time>-<model> by default", type=str)
    data_backend: str = _flag(
        "dali",
        "what reads and augments images: NVIDIA DALI; resident, the fused operator on images that are decoded once and "
        "kept in memory; or torchvision in a DataLoader",
        choices=DATA_BACKENDS,
    )
    workers: int = _flag(4, "threads (torchvision: processes) that read and decode images", short="-j", type=int)
    device: str | None = _flag(None, "cuda, cuda:1 or cpu; cuda where there is one", type=str)
    seed: int = _flag(42, "of the initial weights, the split, the sampling and the augmentation", type=int)

    def __post_init__(self) -> None:
        for name in ("data_dir", "csv", "val_csv", "test_csv", "pretrained_path"):
            if getattr(self, name) == "":  # an unset variable of the shell, which would become the current folder
                raise UserError(f"{spelled(name)} is empty: name a file or folder")
            if getattr(self, name) is not None:  # a run can be resumed and scored from anywhere
                setattr(self, name, str(Path(getattr(self, name)).expanduser().absolute()))
        self._require(all(0 < share <= 1 for share in self.sensitivity), "sensitivity", "above 0 and at most 1")
        sizes = self.train_img_sizes
        self._require(all(size >= 1 for size in sizes), "train_img_sizes", "sizes of at least 1 pixel")
        self._require(sizes == tuple(sorted(sizes)), "train_img_sizes", "sizes that never fall")
        self._require(len(sizes) <= max(self.epochs, 1), "train_img_sizes", "no more sizes than --epochs")
        for name in ("epochs", "batch_size", "img_size", "grad_accum_steps", "workers"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_bad_fraction", *PROBABILITIES):
            self._require(getattr(self, name) is None or 0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        self._require(self.crop_pct is None or 0 < self.crop_pct <= 1, "crop_pct", "above 0 and at most 1")
        self._require(0 < self.val_fraction < 1, "val_fraction", "between 0 and 1")
        self._require(0 <= self.test_fraction < 1, "test_fraction", "at least 0 and below 1")
        self._require(
            self.imbalance_ratio is None or 0 < self.imbalance_ratio <= 1, "imbalance_ratio", "above 0 and at most 1"
        )
        self._require(self.folds is None or self.folds >= 2, "folds", "at least 2")
        for name in ("smoothing", "drop", "model_ema_decay", "class_weights_beta"):
            self._require(getattr(self, name) is None or 0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        for name in ("focal_gamma", "tau", "l2_loss"):
            self._require(0 <= getattr(self, name) < math.inf, name, "at least 0")
        self._require(0 < self.layer_decay <= 1, "layer_decay", "above 0 and at most 1")
        for name in ("lr", "clip_grad", "early_stopping_patience", "unfreeze_epochs"):
            self._require(getattr(self, name) is None or getattr(self, name) > 0, name, "above 0")
        for name in ("weight_decay", "momentum", "warmup_epochs", "min_lr", "drw_epoch"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        self._require(0 <= self.seed < 2**63, "seed", "at least 0 and below 2^63")
        self._require(
            self.warmup_epochs < self.epochs or self.warmup_epochs == 0, "warmup_epochs", "fewer than --epochs"
        )
        require_known(self.model)
        head, _, metric = self.eval_metric.rpartition(".")
        known = f"one of: {', '.join(METRIC_NAMES)}"
        if self.heads:
            known += f"; or HEAD.METRIC with a head of {', '.join(self.heads)}"
        self._require(metric in METRIC_NAMES and (not head or head in self.heads), "eval_metric", known)
        self._require(
            isinstance(self.class_weights, str) or all(0 < weight < math.inf for weight in self.class_weights),
            "class_weights",
            f"one of {', '.join(CLASS_WEIGHTS)}, or numbers above 0",
        )
        self._require_what_goes_together()

    def _require_what_goes_together(self) -> None:
        if self.test_method != "stratified" and not self.test_fraction:
            raise UserError(
                f"--test-method {self.test_method} does nothing without --test-fraction; add --test-fraction 0.2, or "
                "leave it out"
            )
        if self.folds is None and self.fold is not None:
            raise UserError(f"--fold {self.fold} does nothing without --folds; say of how many, or leave it out")
        if self.folds is not None and (self.fold is None or not 0 <= self.fold < self.folds):
            given = "needs --fold" if self.fold is None else f"does not go with --fold {self.fold}"
            raise UserError(
                f"--folds {self.folds} {given}: one of 0 to {self.folds - 1}, or all of them by "
                "python -m engine.cross_validate"
            )
        if self.folds is not None and self.select_on == "test":
            raise UserError(
                "--select-on test does not go with --folds, whose figures are those of images that chose nothing; "
                "leave one out"
            )
        if self.loss == "ldam":
            for name in ("smoothing", "mixup", "cutmix"):
                if getattr(self, name):
                    raise UserError(
                        f"--loss ldam does not go with {spelled(name)} {getattr(self, name)}: its margin is that of "
                        f"an image's one label; leave {spelled(name)} out, or use another --loss"
                    )
        if self.unfreeze_epochs and not (self.freeze or self.freeze_until):
            raise UserError(
                f"--unfreeze-epochs {self.unfreeze_epochs} does nothing where nothing is frozen; add --freeze-until "
                "layer4, or leave it out"
            )
        if self.heads:
            self._require_what_heads_take()
        if self.drw_epoch and self.class_weights == "none":
            raise UserError(
                f"--drw-epoch {self.drw_epoch} does nothing without --class-weights; add --class-weights effective, "
                "or leave it out"
            )
        self._require(self.drw_epoch < self.epochs, "drw_epoch", "below --epochs, or the weights never count")

    def _require_what_heads_take(self) -> None:
        if not isinstance(self.class_weights, str):
            raise UserError("--class-weights as numbers do not go with heads, each with its classes; use balanced")
        if self.drop:
            raise UserError(f"--drop {self.drop} does not go with heads; give each head its own drop")

    def _require(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            value = getattr(self, name)
            given = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"{spelled(name)} {given} does not work: it must be {what}")

    @classmethod
    def from_mapping(cls, values: Any, source: str) -> Config:
        """From a recipe's mapping. Raises UserError that names ``source`` and the key."""
        return cls(**checked_values(dataclasses.fields(cls), values, source))

    def as_mapping(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def train_img_size(self, epoch: int) -> int:
        """The size that the epoch trains on, in pixels: of as many stages of like length as there are sizes.

        The schedule of Tan and Le, "EfficientNetV2", ICML 2021, whose last size may be below that of scoring, as in
        Touvron et al., "Fixing the train-test resolution discrepancy", NeurIPS 2019.
        """
        sizes = self.train_img_sizes or (self.img_size,)
        return sizes[min(epoch * len(sizes) // self.epochs, len(sizes) - 1)]

    def model_options(self) -> dict[str, Any]:
        """What ``create_model`` is told beside the model's name and the number of classes."""
        return {"drop": self.drop, "cosine": self.loss == "ldam"}


def spelled(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")
