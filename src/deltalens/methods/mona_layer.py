"""The Mona layer and its exact fast form, usable alone in one's own network."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MonaConv(nn.Module):
    """a = mean (or sum) of depthwise convolutions of d, plus d;  out = a + PW(a).  Works on (B, n, H, W)."""

    def __init__(self, channels: int, kernels: tuple[int, ...] = (3, 5, 7), reduce: Literal["mean", "sum"] = "mean"):
        super().__init__()
        self.kernels, self.reduce = kernels, reduce
        for i, size in enumerate(kernels, 1):
            self.add_module(f"conv{i}", nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels))
        self.projector = nn.Conv2d(channels, channels, 1)

    def convolutions(self) -> list[nn.Conv2d]:
        return [getattr(self, f"conv{i}") for i in range(1, len(self.kernels) + 1)]

    def forward(self, d: Tensor) -> Tensor:
        total = sum(conv(d) for conv in self.convolutions())
        a = (total / len(self.kernels) if self.reduce == "mean" else total) + d
        return a + self.projector(a)

    def folded_depthwise(self) -> tuple[Tensor, Tensor]:
        """The mean (or sum) of all depthwise convolutions as one kernel (n, 1, k, k) and bias (n).

        The skip is not part of it: a weight near 1 + w would lose most digits of w in bfloat16.
        """
        largest = max(self.kernels)
        convolutions = self.convolutions()
        weight = sum(F.pad(c.weight, ((largest - c.kernel_size[0]) // 2,) * 4) for c in convolutions)
        bias = sum(c.bias for c in convolutions)
        if self.reduce == "mean":
            weight, bias = weight / len(convolutions), bias / len(convolutions)
        return weight, bias


class MonaLayer(nn.Module):
    """Multi-cognitive visual adapter (Yin et al., CVPR 2025, arXiv 2408.08345).

    For a map x (B, H, W, C), with n = `bottleneck`:

        s = LN(x) * gamma + x * gammax
        d = project1(s)                                   C -> n
        a = (DW3(d) + DW5(d) + DW7(d)) / 3 + d            depthwise, "same" zero padding, biases
        b = a + PW(a)                                     1x1
        y = x + project2(dropout(GELU(b)))                n -> C

    Parameters: (2n + 5) C + n^2 + (sum of k^2 + 4 + kernels - 2) n, which is (2n + 5) C + n^2 + 88 n with kernels
    3, 5, 7. gamma and gammax are vectors as in the official code (the paper writes scalars); names and initialisation
    are the official ones. `init="identity"` zeroes project2 instead, so that training starts from the backbone.

    norm: "layer" (scaled LayerNorm), "batch" (BatchNorm in its place), None (s = x). norm_position: "input", or
    "bottleneck" for the paper's earlier design, which normalises the n channels after project1.
    memory: "normal" keeps the bottleneck's activations for backward; "low" recomputes them.

    The forward is the exact fast form: one depthwise convolution with a kernel built from the three, channels last, and
    norm + scaling + project1 as one function that keeps x and two scalars per position for backward. `plain(x)` is the
    same in the order of the official code. Dropout differs in its random stream only.
    """

    spatial = True

    def __init__(
        self,
        dim: int,
        bottleneck: int = 64,
        kernels: tuple[int, ...] = (3, 5, 7),
        reduce: Literal["mean", "sum"] = "mean",
        norm: Literal["layer", "batch"] | None = "layer",
        norm_position: Literal["input", "bottleneck"] = "input",
        dropout: float = 0.1,
        init: Literal["official", "identity"] = "official",
        memory: Literal["normal", "low"] = "normal",
    ):
        super().__init__()
        self.norm_position, self.memory = norm_position, memory
        normed = dim if norm_position == "input" else bottleneck
        self.project1 = nn.Linear(dim, bottleneck)
        self.adapter_conv = MonaConv(bottleneck, kernels, reduce)
        self.project2 = nn.Linear(bottleneck, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, None: lambda _: None}[norm](normed)
        if norm is not None:
            self.gamma = nn.Parameter(torch.full((normed,), 1e-6))
            self.gammax = nn.Parameter(torch.ones(normed))
        for layer in (self.project1, self.project2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if init == "identity":
            nn.init.zeros_(self.project2.weight)

    def forward(self, x: Tensor) -> Tensor:
        d = self._down(x)
        if self.memory == "low" and torch.is_grad_enabled():
            return x + checkpoint(self._tail, d, use_reentrant=False)
        return x + self._tail(d)

    def plain(self, x: Tensor) -> Tensor:
        """The published formulation, operation by operation."""
        d = self.project1(self._scaled_norm(x) if self.norm_position == "input" else x)
        if self.norm_position == "bottleneck":
            d = self._scaled_norm(d)
        b = self.adapter_conv(d.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        return x + self.project2(self.dropout(F.gelu(b)))

    def _scaled_norm(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        if isinstance(self.norm, nn.BatchNorm1d):
            normed = self.norm(x.flatten(0, -2)).view(x.shape)
        else:
            normed = self.norm(x)
        return normed * self.gamma + x * self.gammax

    def _down(self, x: Tensor) -> Tensor:
        if self.norm_position == "bottleneck":
            return self._scaled_norm(self.project1(x))
        if not isinstance(self.norm, nn.LayerNorm):
            return self.project1(self._scaled_norm(x))
        wide = torch.promote_types(self.gamma.dtype, torch.float32)  # gamma's gradient is a difference of large sums
        gamma = self.gamma.to(wide)
        scale, shift = self.norm.weight.to(wide) * gamma, self.norm.bias.to(wide) * gamma
        return scaled_norm_linear(x, scale, shift, self.gammax, self.project1.weight, self.project1.bias, self.norm.eps)

    def _tail(self, d: Tensor) -> Tensor:
        return _bottleneck_tail(self, d, *self.adapter_conv.folded_depthwise())

    def folded(self) -> FoldedMona:
        """The inference-only module that computes the same in eval mode with kernels built once."""
        return FoldedMona(self)


def _bottleneck_tail(layer: MonaLayer, d: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    convolved = F.conv2d(d.permute(0, 3, 1, 2), kernel, bias, padding=kernel.shape[-1] // 2, groups=len(kernel))
    a = convolved.permute(0, 2, 3, 1) + d
    projector = layer.adapter_conv.projector
    b = F.linear(a, projector.weight[:, :, 0, 0], projector.bias) + a
    return layer.project2(layer.dropout(F.gelu(b)))


class FoldedMona(nn.Module):
    """A trained MonaLayer with its kernels summed once, for inference."""

    spatial = True

    def __init__(self, layer: MonaLayer):
        super().__init__()
        self.layer = layer.eval().requires_grad_(False)
        kernel, bias = layer.adapter_conv.folded_depthwise()
        self.register_buffer("kernel", kernel.detach().clone(memory_format=torch.channels_last))
        self.register_buffer("kernel_bias", bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        d = self.layer._down(x)
        return x + _bottleneck_tail(self.layer, d, self.kernel, self.kernel_bias)


# ------------------------------------------------------------------ LayerNorm + scaling + projection in one function
def scaled_norm_linear(
    x: Tensor, scale: Tensor, shift: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """linear(standardise(x) * scale + shift + x * skip), keeping only x and two scalars per position for backward.

    x (..., C); scale, shift, skip (C); weight (n, C); bias (n). The sum is formed before the product: splitting it into
    two products would be exact in float64 but loses a quarter of the result in bfloat16 when x has a large mean.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = weight.dtype
    return _ScaledNormLinear.apply(x, scale, shift, skip, weight, bias, dtype, eps)


class _ScaledNormLinear(torch.autograd.Function):
    """The norm runs in the wider of x's and the scales' dtype, the product in `dtype`, forward and backward."""

    @staticmethod
    def forward(ctx, x, scale, shift, skip, weight, bias, dtype, eps):
        wide = torch.promote_types(x.dtype, scale.dtype)
        xw = x.to(wide)
        normed, mean, rstd = torch.native_layer_norm(xw, xw.shape[-1:], scale.to(wide), shift.to(wide), eps)
        s = torch.addcmul(normed, xw, skip.to(wide))
        ctx.save_for_backward(x, scale, shift, skip, weight, mean, rstd)
        ctx.dtype, ctx.wide, ctx.eps, ctx.bias_dtype = dtype, wide, eps, bias.dtype
        return F.linear(s.to(dtype), weight.to(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, skip, weight, mean, rstd = ctx.saved_tensors
        xw, scale_w, shift_w = x.to(ctx.wide), scale.to(ctx.wide), shift.to(ctx.wide)
        need_x = ctx.needs_input_grad[0]
        grad_weight = None
        if ctx.needs_input_grad[4]:
            normed = torch.native_layer_norm(xw, xw.shape[-1:], scale_w, shift_w, ctx.eps)[0]
            s = torch.addcmul(normed, xw, skip.to(ctx.wide)).to(ctx.dtype)
            grad_weight = (grad.flatten(0, -2).T @ s.flatten(0, -2)).to(weight.dtype)
        grad_s = (grad @ weight.to(ctx.dtype)).to(ctx.wide)
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad_s, xw, xw.shape[-1:], mean, rstd, scale_w, shift_w, [need_x, True, True]
        )
        grad_skip = (grad_s * xw).flatten(0, -2).sum(0).to(skip.dtype)
        if need_x:
            grad_x = torch.addcmul(grad_x, grad_s, skip.to(ctx.wide)).to(x.dtype)
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[5] else None
        return (
            grad_x,
            grad_scale.to(scale.dtype),
            grad_shift.to(shift.dtype),
            grad_skip,
            grad_weight,
            grad_bias,
            None,
            None,
        )
