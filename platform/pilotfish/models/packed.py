"""Pre-packed linear layers: float32 inference on a CPU without re-packing weights every call."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_SIZE = 2**17  # below it, calling oneDNN costs more than it saves (measured)
_ROWS = 32  # oneDNN lays weights out for this many rows; other batch sizes run as fast (measured)


def pack_linears(model: nn.Module) -> None:
    """Give every large bias-free float32 CPU linear a forward on weights laid out for oneDNN.

    Parameters stay where and what they are, so hashes and saves see the same model; they must not
    change afterwards. On accelerators, in other dtypes, without oneDNN and for weights that are
    sharded over processes nothing happens.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is None:
            weight = module.weight
            # A tensor-parallel weight is a DTensor, and its module's forward is transformers' own;
            # a weight partitioned by ZeRO has no elements here.
            whole = type(weight) is nn.Parameter
            on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
            if whole and on_cpu and weight.numel() >= _MIN_SIZE:
                module.forward = _PackedForward(weight)


class _PackedForward:
    """`x @ weight.T` with the weight packed once."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        # The reorder may write through its argument, hence the clone.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone(), _ROWS)

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear names it
        if input.requires_grad and torch.is_grad_enabled():
            # oneDNN's operator has no derivative: a gradient would silently skip this layer.
            return F.linear(input, self._weight)
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, None, "none", [], "")
