"""bfloat16 autocast, float64, and activation checkpointing, for every family and method."""

import pytest
import torch
from models import METHODS, MODELS, PAIRS, assert_same, backward, gradients, images, randomize_adapter

import deltalens as dl

each_pair = pytest.mark.parametrize(("family", "method"), PAIRS)


def adapted(family, method, **kwargs):
    model = dl.attach(MODELS[family](**kwargs), METHODS[method])
    return randomize_adapter(model)


@each_pair
def test_bf16_autocast_is_close(family, method):
    model, x = adapted(family, method), images(family)
    output, expected = backward(model, x)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (found.float() * weights).sum().backward()
    assert relative_error(found.float(), output) < 0.05
    grads = gradients(model)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert relative_error(flat(grads), flat(expected)) < 0.1


@each_pair
def test_whole_model_in_bf16_and_float64(family, method):
    model, x = adapted(family, method), images(family)
    output = model(x)
    exact = model.double()(x.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), output, atol=1e-4, rtol=1e-3)
    low = model.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert relative_error(low.float(), output) < 0.15
    low.sum().backward()
    assert {g.dtype for g in gradients(model).values()} == {torch.bfloat16}


@each_pair
def test_checkpointed_gradients_are_equal(family, method):
    model, x = adapted(family, method).double(), images(family).double()
    output, expected = backward(model, x)
    model.set_grad_checkpointing()
    found, grads = backward(model, x)
    torch.testing.assert_close(found, output, atol=1e-12, rtol=1e-12)
    assert_same(grads, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_checkpointing_with_dropout_draws_the_same_numbers_again(family):
    """Prompt dropout, LoRA dropout and Mona's dropout are replayed when a block runs again."""
    from deltalens.methods import LoRAConfig, MonaConfig, VPTConfig

    configs = [
        VPTConfig(num_tokens=4, dropout=0.5),
        LoRAConfig(r=2, dropout=0.5),
        MonaConfig(bottleneck=4, dropout=0.5, memory="low"),
    ]
    model, x = MODELS[family]().double(), images(family).double()
    dl.attach(model, configs)
    randomize_adapter(model).train()
    results = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        results.append(backward(model, x))
    (output, expected), (found, grads) = results
    torch.testing.assert_close(found, output, atol=1e-12, rtol=1e-12)
    assert_same(grads, expected, atol=1e-10, rtol=1e-8)
    torch.manual_seed(4)
    assert (model(x) - output).abs().max() > 1e-3  # the dropout is there


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
