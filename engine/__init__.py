"""Training engine for image classification on imbalanced data: SE-ResNets, channels-last, mixed precision."""

import kernels as _kernels

if not hasattr(_kernels, "fuse_se"):
    raise ImportError(
        f"the package `kernels` found at {_kernels.__file__} is another one (Hugging Face publishes an unrelated "
        "package of that name); install this project in a virtual environment of its own, or `pip uninstall kernels`"
    )
