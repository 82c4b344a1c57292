"""SMoA, the pool of small experts that Adapter-X shares over blocks, and its one-token prompt generators."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalens.methods.bottleneck import ACTIVATIONS


class Routing(nn.Module):
    """Which expert a sub-token goes to: p = softmax( W s . e_i / |e_i| / tau ), s (..., d/h) -> logits (..., N).

    W (w, d/h) without bias; e (N, w) starts orthogonal, 0.32 long, as in X-MoE's code. normalize_tokens: W s is divided
    by its length, too (the cosine of X-MoE's paper). temperature: tau, None for 1 without a parameter; learned where
    `learn`.
    """

    def __init__(self, width: int, experts: int, inner: int, normalize_tokens: bool, temperature: float, learn: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inner, width))
        self.experts = nn.Parameter(torch.empty(experts, inner))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.orthogonal_(self.experts, gain=0.32)
        self.normalize_tokens, self.temperature = normalize_tokens, temperature
        if learn:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def probabilities(self, narrow: Tensor) -> Tensor:
        """W s (..., w) -> p (..., N), in float32 or better."""
        exact = torch.promote_types(narrow.dtype, torch.float32)
        narrow = F.normalize(narrow, dim=-1) if self.normalize_tokens else narrow
        logits = F.linear(narrow, F.normalize(self.experts, dim=-1).to(narrow.dtype)).to(exact)
        if "log_temperature" in self._parameters:
            logits = logits * torch.exp(-self.log_temperature)
        elif self.temperature != 1:
            logits = logits / self.temperature
        return logits.softmax(-1)


class _WideProduct(torch.autograd.Function):
    """(h (M, r), g (M, N), U (N, r, d)) -> sum_k g_k h U_k (M, d), as one product of the rows (g_1 h, ..., g_N h) with
    all U. The rows, N times as long as h, are made again in backward instead of kept."""

    @staticmethod
    def forward(h: Tensor, g: Tensor, up: Tensor) -> Tensor:
        return _rows(h, g) @ up.flatten(0, 1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, g, up = ctx.saved_tensors
        of_up = (_rows(h, g).T @ gradient).view(up.shape)
        of_rows = (gradient @ up.flatten(0, 1).T).unflatten(1, up.shape[:2])
        return (of_rows * g.unsqueeze(-1)).sum(1), (of_rows * h.unsqueeze(1)).sum(2), of_up


def _rows(h: Tensor, g: Tensor) -> Tensor:
    return (g.unsqueeze(-1) * h.unsqueeze(1)).flatten(1)


class SMoA(nn.Module):
    """y = scale * merge( p_k A_k(s) ),  s = split(x): h chunks of the channels of each token, k = argmax p

    x (..., C) -> y (..., C). A_k(s) = up_k( dropout( act( down_k(s) ) ) ), down_k (r, C/h), up_k (C/h, r), with biases.
    No capacity: every sub-token reaches its expert. dense: all experts, y = sum_k p_k A_k(s). N = 1 has no router, and
    p = 1. down starts Kaiming-uniform (a = sqrt 5), up and all biases zero.

    Computed as two products for all experts at once: s with all down_k and W next to each other, then the chosen
    expert's r numbers times p_k, in its place among the N r of a row of zeros, with all up_k. Neither sorts nor loops.

    Parameters: N (2 r C/h + r + C/h) + w C/h + N w.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        experts: int,
        bottleneck: int,
        router_width: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        scale: float = 1.0,
        normalize_tokens: bool = False,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        jitter: float = 0.0,
        dense: bool = False,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide a stream of {width} channels; choose a divisor of it")
        inner = width // heads
        self.down = nn.Parameter(torch.empty(experts, bottleneck, inner))
        self.up = nn.Parameter(torch.zeros(experts, bottleneck, inner))
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix.data, a=math.sqrt(5))
        self.down_bias = nn.Parameter(torch.zeros(experts, bottleneck)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(experts, inner)) if bias else None
        if experts > 1:
            self.router = Routing(inner, experts, router_width, normalize_tokens, temperature, learn_temperature)
        self.dropout, self.activation, self.scale = nn.Dropout(dropout), activation, scale
        self.heads, self.jitter, self.dense = heads, jitter, dense

    @property
    def experts(self) -> int:
        return self.down.shape[0]

    def split(self, x: Tensor) -> Tensor:
        """Tokens (..., C) -> sub-tokens (M, C/h): the h chunks of a token follow each other."""
        return x.reshape(-1, x.shape[-1] // self.heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y, p): the result, and the probabilities (M, N) of the sub-tokens, None where there is one expert."""
        sub = self.split(x)
        hidden, probabilities = self._read(sub)
        y = self._write(hidden, probabilities)
        return y.view(x.shape), probabilities

    def routed(self, x: Tensor) -> Tensor:
        """Probabilities (M, N) alone, without jitter."""
        if self.experts == 1:
            return x.new_ones(x.numel() // self.down.shape[-1], 1)
        return self.router.probabilities(F.linear(self.split(x), self.router.weight))

    def _read(self, sub: Tensor) -> tuple[Tensor, Tensor | None]:
        """(down_k(s) of all experts (M, N, r), probabilities)."""
        down, bias = self.down.flatten(0, 1), None if self.down_bias is None else self.down_bias.flatten()
        if self.experts == 1:
            return F.linear(sub, down, bias).unsqueeze(1), None
        weight = self.router.weight
        if self.jitter and self.training:
            hidden = F.linear(sub, down, bias)
            narrow = F.linear(sub * torch.empty_like(sub).uniform_(1 - self.jitter, 1 + self.jitter), weight)
        else:
            both = F.linear(sub, torch.cat([down, weight]), None if bias is None else F.pad(bias, (0, weight.shape[0])))
            hidden, narrow = both.split([down.shape[0], weight.shape[0]], 1)
            narrow = narrow.contiguous()  # saved for backward, and a view would keep all of `both`
        return hidden.unflatten(1, self.down.shape[:2]), self.router.probabilities(narrow)

    def _write(self, hidden: Tensor, probabilities: Tensor | None) -> Tensor:
        """sum_k p_k A_k of the chosen experts, or of all: (M, N, r) -> (M, C/h)."""
        if probabilities is None:
            gates = hidden.new_full((1, 1), self.scale)
        else:
            gates = (probabilities * self.scale).to(hidden.dtype)
        if probabilities is not None and not self.dense:
            one = chosen_experts(probabilities).to(hidden.dtype)
            hidden = (hidden * one.unsqueeze(-1)).sum(1)  # the chosen expert's r numbers
            gates = gates * one
        hidden = self.dropout(ACTIVATIONS[self.activation](hidden))
        up = self.up
        if self.up_bias is not None:
            hidden, up = F.pad(hidden, (0, 1), value=1.0), torch.cat([up, self.up_bias.unsqueeze(1)], 1)
        up = up.to(hidden.dtype)
        if hidden.dim() == 2:
            return _WideProduct.apply(hidden, gates, up)
        return (hidden * gates.unsqueeze(-1)).flatten(1) @ up.flatten(0, 1)


def chosen_experts(probabilities: Tensor) -> Tensor:
    """p (M, N) -> whether an expert is a sub-token's first choice (M, N); of equal ones the first is."""
    numbers = torch.arange(probabilities.shape[-1], device=probabilities.device)
    return probabilities.argmax(-1, keepdim=True) == numbers


def balance(probabilities: Tensor) -> Tensor:
    """Switch's N * sum_i f_i P_i: f_i the share of sub-tokens whose first choice is i, P_i their mean probability. 1
    where all are equal, N where one expert gets all. p (M, N) -> scalar with the gradient through P."""
    shares = chosen_experts(probabilities).to(probabilities.dtype).mean(0)
    return probabilities.shape[-1] * (shares * probabilities.mean(0)).sum()


class ScaleAndShift(nn.Module):
    """P = gamma * mean over tokens of act(y) + beta: (B, N, C) -> (B, 1, C). gamma ~ N(1, .02), beta ~ N(0, .02)."""

    def __init__(self, width: int, activation: str | None):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.empty(width).normal_(0, 0.02))
        self.activation = activation

    def forward(self, y: Tensor) -> Tensor:
        y = y if self.activation is None else ACTIVATIONS[self.activation](y)
        return torch.addcmul(self.beta, self.gamma, y.mean(1, keepdim=True).to(self.gamma.dtype))


class SmallMLP(nn.Module):
    """P = W_2 gelu( W_1 m + b_1 ) + b_2, m the mean over tokens of act(y): (B, N, C) -> (B, 1, C), with `hidden`
    numbers between. W_1 starts Kaiming-uniform, W_2 and b_1 zero, b_2 ~ N(0, .02)."""

    def __init__(self, width: int, activation: str | None, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.weight)
        nn.init.normal_(self.fc2.bias, std=0.02)
        self.activation = activation

    def forward(self, y: Tensor) -> Tensor:
        y = y if self.activation is None else ACTIVATIONS[self.activation](y)
        return self.fc2(F.gelu(self.fc1(y.mean(1, keepdim=True))))
