"""LoRA's training pass in as few operations as it needs: the same numbers as PEFT's, in less time and memory.

For a frozen layer ``W`` and an adapter ``A, B`` (Hu et al. 2021, arXiv 2106.09685, equation 3) PEFT computes ``x W'``,
``(x A') B'``, its product with the scaling and the sum, each a tensor of full size, and as many again in the backward
pass, where the input's gradient is a sum of two. Here a second product is added into the first while it is computed,
and what is kept for the backward pass is ``x`` and ``x A'``.

On a base in bf16 the adapter stays in fp32: what is multiplied is its copy in bf16, as under autocast, and what the
optimizer moves are the fp32 weights, with fp32 gradients. PEFT casts each input up to fp32 instead. So it is still done
in fp16, where the gradient's products with a small B would underflow.

The passes of `fuse` hold for plain linear layers and 4-bit ones in training with one plain LoRA adapter of the same
floating-point type as the input, or of fp32 on bf16; `_fits` looks at every call, and every other call goes through
PEFT's own.
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


class _Adapted(torch.autograd.Function):
    """``x W' + bias + scaling (x A') B'`` of rows ``[N, in]``: ``[N, out]``; W and the bias are frozen.

    All products are made in the type of x. A and B may have a wider one, which is then that of their gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        low = x @ a.to(x.dtype).t()
        out = linear(x, _weight(layer, x.dtype), layer.bias)
        ctx.save_for_backward(x, low, a, b)
        ctx.layer, ctx.scaling = layer, scaling
        return out.addmm_(low, b.to(x.dtype).t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, low, a, b = ctx.saved_tensors
        of_low = (gradient @ b.to(x.dtype)).mul_(ctx.scaling)
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ _weight(ctx.layer, x.dtype)).addmm_(of_low, a.to(x.dtype))
        if ctx.needs_input_grad[2]:
            of_a = (of_low.t() @ x).to(a.dtype)
        if ctx.needs_input_grad[3]:
            of_b = (gradient.t() @ low).to(b.dtype).mul_(ctx.scaling)
        return of_x, None, of_a, of_b, None


def _weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return the weight ``[out, in]`` to compute with; of 4 bits it comes in the type that it was quantized from."""
    if isinstance(layer, Linear4bit):
        weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight.to(dtype)
    return layer.weight


def _fits(layer: Any, x: Tensor) -> bool:
    """Whether a call is a training pass of one plain adapter, in one floating-point type or with fp32 weights on bf16.

    In training mode a pass without gradients counts as well, so that it gives the numbers of one with them to the bit.
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or active[0] in layer.lora_variant:
        return False
    base, a, b = layer.base_layer, layer.lora_A[active[0]], layer.lora_B[active[0]]
    of_base = base.compute_dtype if isinstance(base, Linear4bit) else base.weight.dtype
    return (
        (layer.training or _differentiates(x, a.weight, b.weight))
        and not torch.is_autocast_enabled(x.device.type)
        and a.bias is None
        and b.bias is None
        and isinstance(layer.lora_dropout[active[0]], nn.Identity)
        and x.dtype == of_base
        and a.weight.dtype == b.weight.dtype
        and (a.weight.dtype == x.dtype or (a.weight.dtype, x.dtype) == (torch.float32, torch.bfloat16))
        and (base.bias is None or (not base.bias.requires_grad and base.bias.dtype == x.dtype))
        and not base.weight.requires_grad
    )


def _differentiates(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _forward(layer: Any, usual: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _fits(layer, x):
        result: Tensor = usual(x, *args, **kwargs)
        return result
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    rows = x.reshape(-1, x.shape[-1])
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    apply: Any = _Adapted.apply
    out: Tensor = apply(rows, layer.base_layer, a, b, layer.scaling[name])
    return out.view(*x.shape[:-1], -1)


def fuse(model: nn.Module) -> None:
    """Let the LoRA layers of a model run as here wherever they can; their names and parameters stay as they are."""
    for layer in model.modules():
        plain = isinstance(layer, LoraLayer) and type(layer.base_layer) in (nn.Linear, Linear4bit)
        if plain and "forward" not in vars(layer):
            usual = layer.forward
            layer.forward = lambda x, *args, _layer=layer, _usual=usual, **kwargs: _forward(
                _layer, _usual, x, *args, **kwargs
            )
