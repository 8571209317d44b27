"""A trained network as other programs take it: BatchNorm folded, normalisation and softmax inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from engine.heads import Heads


class InferenceModel(nn.Module):
    """(N, 3, H, W) uint8 RGB images, already resized, to what `output_names` names, each (N, classes) float32.

    Args:
        model: normalised images to logits, or of heads to {head: logits}.
        heads: those of the model; None: it has one classifier.
        mean: of RGB in [0, 1], as ``std``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, heads: Heads | None, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits = self.model((images.float() / 255 - self.mean) / self.std)
        if self.heads is None:
            return logits.softmax(dim=1), logits
        of_heads = [output for name in self.heads.tasks for output in (logits[name].softmax(dim=1), logits[name])]
        return self.heads.together(logits).exp(), *of_heads


def output_names(heads: Heads | None) -> tuple[str, ...]:
    """Of an `InferenceModel`; with heads the probabilities are those end to end, and then come both of each head."""
    if heads is None:
        return "probabilities", "logits"
    return "probabilities", *(f"{what}_{name}" for name in heads.tasks for what in ("probabilities", "logits"))


def fold_norms(program: torch.export.ExportedProgram) -> int:
    """Folds each BatchNorm that alone reads a convolution into it, in place; returns how many. In evaluation mode.

    The convolution's bias then stands where that of the BatchNorm was, whose other tensors nothing reads any more.
    """
    signature, state, folded = program.graph_signature, program.state_dict, 0
    keys = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for norm in program.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default):
        conv, gamma, beta, mean, var, _, _, eps, _ = norm.args
        if conv.target is not torch.ops.aten.conv2d.default or len(conv.users) > 1:
            continue
        x, weight, bias, *how = conv.args if len(conv.args) > 2 else (*conv.args, None)
        nodes = [weight, mean, var, gamma, beta] + ([] if bias is None else [bias])
        # what is computed, or read by another layer too, is nothing to be changed
        if any(node is None or node.name not in keys or len(node.users) > 1 for node in nodes):
            continue
        w, running_mean, running_var, g, b, *conv_bias = (state[keys[node.name]] for node in nodes)
        state[keys[weight.name]], state[keys[beta.name]] = fuse_conv_bn_weights(
            w, conv_bias[0] if conv_bias else None, running_mean, running_var, eps, g, b
        )
        conv.args = (x, weight, beta, *how)
        norm.replace_all_uses_with(conv)
        program.graph.erase_node(norm)
        folded += 1
    program.graph_module.recompile()
    return folded
