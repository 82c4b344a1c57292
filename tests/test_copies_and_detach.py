"""An adapted model is still the module it was: names, classes, copies, pickles; and detach gives the backbone back.

(Pickles in a fresh process: test_ddp.py, whose workers receive their models that way.)
"""

import copy
import pickle

import pytest
import torch
from models import METHODS, MODELS, PAIRS, images, randomize_adapter

import deltalens as dl
from deltalens.methods import FullConfig

each_pair = pytest.mark.parametrize(("family", "method"), PAIRS)


def adapted(family, method):
    model = dl.attach(MODELS[family](), METHODS[method])
    return randomize_adapter(model)


def signature(model) -> dict[str, tuple]:
    """Everything about modules that user code can lean on."""
    return {name: (type(m), m.training, list(m._parameters), list(m._buffers)) for name, m in model.named_modules()}


@each_pair
def test_attach_then_detach_is_bit_for_bit(family, method):
    model, x = MODELS[family](), images(family)
    model.get_parameter(next(name for name, _ in model.named_parameters())).requires_grad_(False)
    modules, objects = signature(model), {name: id(p) for name, p in model.named_parameters()}
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    output, hidden = model(x), dict(model.__dict__)

    dl.attach(model, METHODS[method], num_classes=7)
    randomize_adapter(model)
    model.train()(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    assert model.eval()(x).shape == (2, 7)
    dl.detach(model)

    assert signature(model) == modules
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(model(x), output)
    assert model.num_classes == 5
    assert model.__dict__.keys() == hidden.keys()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", MODELS)
def test_full_fine_tuning_detaches_bit_for_bit_too(family):
    model, x = MODELS[family](), images(family)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    output = model(x)
    dl.attach(model, FullConfig())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model.train()(x).sum().backward()
        optimizer.step()
    assert any(not torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    dl.detach(model)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.equal(model.eval()(x), output)


@each_pair
def test_names_and_classes_stay(family, method):
    plain, model = MODELS[family](), adapted(family, method)
    names = {name for name, _ in plain.named_parameters()}
    assert names <= {name for name, _ in model.named_parameters()}
    assert all("delta" in name.split(".") for name in {n for n, _ in model.named_parameters()} - names)
    for name, module in plain.named_modules():
        twin = model.get_submodule(name)
        assert isinstance(twin, type(module))
        assert type(twin).__name__ == type(module).__name__
        assert type(twin).__module__ == type(module).__module__
    weights = plain.state_dict()
    assert weights.keys() <= model.state_dict().keys()
    model.load_state_dict(weights, strict=False)


def test_a_plain_checkpoint_after_attach_gets_a_hint():
    model = adapted("vit", "mona")
    with pytest.raises(RuntimeError, match="load it before attach"):
        model.load_state_dict(MODELS["vit"]().state_dict())


@each_pair
def test_copies_compute_the_same_and_are_independent(family, method):
    model, x = adapted(family, method), images(family)
    output = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), output)
        assert twin.state_dict().keys() == model.state_dict().keys()
        assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
            n: p.requires_grad for n, p in model.named_parameters()
        }
        pointers = {p.data_ptr() for p in model.parameters()}
        assert not pointers & {p.data_ptr() for p in twin.parameters()}
        for parameter in twin.parameters():
            parameter.data.mul_(0.5)
        with dl.disable_adapter(twin):
            twin(images(family, size=None))
        dl.detach(twin)
        assert torch.equal(model(x), output)
        assert dl.active_adapters(model) == ("default",)


def test_copies_keep_their_inactive_tensors():
    model, x = MODELS["resnet"](), images("resnet")
    plain = model(x)
    dl.attach(model, FullConfig(), name="a", num_classes=3)
    model.train()(x)
    model.eval()
    first = model(x)
    dl.attach(model, FullConfig(), name="b", num_classes=4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin(x).shape == (2, 4)
        dl.set_adapter(twin, "a")
        assert torch.equal(twin(x), first)
        dl.detach(twin)
        assert torch.equal(twin(x), plain)
    assert dl.active_adapters(model) == ("b",)
