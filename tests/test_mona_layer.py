"""MonaLayer's fast form against the published order of operations."""

import itertools

import pytest
import torch
from torch import nn

from deltalens.methods import MonaLayer
from deltalens.methods.mona_layer import scaled_norm_linear

OPTIONS = [
    {"norm": norm, "norm_position": position, "reduce": reduce, "kernels": kernels, "memory": memory}
    for norm, position, reduce, kernels, memory in itertools.product(
        ("layer", "batch", None), ("input", "bottleneck"), ("mean", "sum"), ((3, 5, 7), (1,), (5, 3)), ("normal", "low")
    )
]


def layer(dim=12, bottleneck=6, seed=0, **options) -> MonaLayer:
    """A layer without dropout whose every parameter matters."""
    torch.manual_seed(seed)
    module = MonaLayer(dim, bottleneck, dropout=0.0, **options)
    for name, parameter in module.named_parameters():
        scale = 0.5 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        start = 1.0 if name in ("gammax", "norm.weight") else 0.0
        parameter.data = start + scale * torch.randn_like(parameter)
    if isinstance(module.norm, nn.BatchNorm1d):
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2)
    return module


def run(module, forward, x):
    """Output, gradients by name (of the input too)."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = forward(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("training", [False, True])
def test_fast_equals_plain_in_float64(options, training):
    x = torch.randn(2, 5, 9, 12, dtype=torch.float64) + 2
    fast, plain = (layer(**options).double().train(training) for _ in range(2))
    found, grads = run(fast, fast, x)
    expected, plain_grads = run(plain, plain.plain, x)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert grads.keys() == plain_grads.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], plain_grads[name], atol=1e-10, rtol=1e-10)
    for name, buffer in fast.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_only_what_is_asked_gets_a_gradient(memory):
    module, x = layer(memory=memory).double(), torch.randn(2, 4, 4, 12, dtype=torch.float64)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.requires_grad_(False)
    x.requires_grad_()
    module(x).sum().backward()
    (expected,) = torch.autograd.grad(module.plain(x).sum(), x)
    torch.testing.assert_close(x.grad, expected, atol=1e-10, rtol=1e-10)


def test_layouts_in_memory_do_not_matter():
    module = layer().double()
    x = torch.randn(2, 12, 5, 9, dtype=torch.float64).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), module(x.contiguous()), atol=1e-12, rtol=0)
    strided = torch.randn(2, 5, 9, 24, dtype=torch.float64)[..., ::2]
    torch.testing.assert_close(module(strided), module.plain(strided), atol=1e-10, rtol=0)


def test_gradient_and_gradient_of_the_gradient_of_the_fused_norm():
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 4), (4,), (4,), (4,), (5, 4), (5,))]
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: scaled_norm_linear(*t, 1e-5), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: scaled_norm_linear(*t, 1e-5), tensors)


def test_saves_less_for_backward():
    """Bytes kept: the plain form keeps the normed map, its scaled copies and every convolution's input."""
    x = torch.randn(2, 14, 14, 96, requires_grad=True)

    def kept(forward, module) -> int:
        storages = {}
        own = {p.untyped_storage().data_ptr() for p in module.parameters()}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward(x)
        return sum(size for pointer, size in storages.items() if pointer not in own)

    normal, low = layer(96, 64), layer(96, 64, memory="low")
    plain = kept(normal.plain, normal)
    assert kept(normal, normal) < 0.7 * plain
    assert kept(low, low) < 0.4 * plain


def error(found, exact) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_bf16_error_is_no_worse_than_the_plain_forms(mean, how, memory):
    """Relative to float64, output without the skip and every gradient, averaged over seeds."""
    errors = {"fast": {}, "plain": {}}
    for seed in range(10):
        module = layer(48, 16, seed=seed, memory=memory)
        x = (mean + torch.randn(2, 10, 10, 48)).bfloat16().float()
        weights = {name: p.data.clone() for name, p in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.data = weights[name].bfloat16().float()
        exact, exact_grads = run(module.double(), module.plain, x.double())
        module = module.bfloat16() if how == "bfloat16" else module.float()
        given = x.bfloat16() if how == "bfloat16" else x
        for form, forward in (("fast", module), ("plain", module.plain)):

            def call(x, forward=forward):
                with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                    return forward(x) - x

            found, grads = run(module, call, given)
            seen = {
                "output": error(found, exact - x),
                **{name: error(g, exact_grads[name]) for name, g in grads.items() if name != "x"},
            }
            for name, value in seen.items():
                errors[form][name] = errors[form].get(name, 0) + value / 10
    for name, value in errors["fast"].items():
        assert value <= 1.25 * errors["plain"][name] + 1e-4, (name, errors)


def test_identity_start():
    module, x = MonaLayer(12, 6, init="identity"), torch.randn(2, 4, 4, 12)
    assert torch.equal(module(x), x)
    assert not torch.equal(MonaLayer(12, 6)(x), x)


def test_parameters_follow_the_formula():
    for dim, width in ((96, 64), (12, 6)):
        assert (
            sum(p.numel() for p in MonaLayer(dim, width).parameters()) == (2 * width + 5) * dim + width**2 + 88 * width
        )
