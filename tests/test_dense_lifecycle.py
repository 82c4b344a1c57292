"""Dense networks through the whole life of an adapter: counted, switched, copied, merged, compiled, recomputed."""

import copy
import pickle

import pytest
import torch
from dense_models import loss_of, network, pictures
from models import randomize_adapter
from torch import nn

import deltalens as dl

MONA = dl.MonaConfig(bottleneck=4, dropout=0.0)
KINDS = [("swin", "upernet"), ("vit", "setr_pup")]


def adapted(kind="swin", head="fcn", method=MONA, seed=0):
    """An adapted network whose adapter and head have random values."""
    model = dl.attach(network(kind, head), method)
    randomize_adapter(model, seed)
    return model.eval()


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_counts_tell_adapter_head_and_backbone_apart(kind, head):
    model = network(kind, head)
    backbone = sum(p.numel() for p in model.get_submodule(model.adapted).parameters())
    around = sum(p.numel() for p in model.parameters()) - backbone
    dl.attach(model, MONA)
    count = dl.count_parameters(model)
    assert (count.head, count.backbone) == (around, backbone)
    inserted = [row for row in dl.parameter_table(model) if row.kind == "inserted"]
    assert count.adapter == sum(row.numel for row in inserted) > 0
    assert all(row.name.startswith(f"{model.adapted}.") for row in inserted)


def test_adapters_with_heads_of_their_own_are_switched():
    model, x = adapted(), pictures()
    plain = network("swin", "fcn")(x)["out"]
    first = model(x)["out"]
    dl.attach(model, dl.LoRAConfig(r=2), "second")
    randomize_adapter(model, seed=1)
    second = model.eval()(x)["out"]
    dl.set_adapter(model, "default")
    assert torch.equal(model(x)["out"], first)
    dl.set_adapter(model, "second")
    assert torch.equal(model(x)["out"], second)
    with dl.disable_adapter(model):
        assert torch.equal(model(x)["out"], plain)
    dl.delete_adapter(model, "second")
    dl.set_adapter(model, "default")
    assert torch.equal(model(x)["out"], first)
    assert torch.equal(dl.detach(model)(x)["out"], plain)


@pytest.mark.parametrize("method", [MONA, dl.LoRAConfig(r=2), dl.VPTConfig(num_tokens=2)])
@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_merged_networks_compute_the_same(kind, method):
    model, x = adapted(kind, method=method).double(), pictures(45, 67).double()
    with torch.no_grad():
        before = model(x)["out"]
        torch.testing.assert_close(dl.merge_and_unload(model)(x)["out"], before)


def test_copies_are_networks_of_their_own():
    model, x = adapted("vit", "dpt"), pictures()
    before = model(x)["out"]
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    randomize_adapter(model, seed=3)
    assert (model(x)["out"] - before).abs().max() > 1e-3
    for each in copies:
        assert torch.equal(each(x)["out"], before)


def test_batchnorms_of_the_head_train_and_those_of_the_backbone_do_not():
    model = dl.attach(network("resnet", "fcn"), dl.LinearConfig()).train()
    norms = {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    inside = {path for path in norms if path.startswith("maps.backbone.")}
    assert inside
    assert {path for path, module in norms.items() if module.training} == norms.keys() - inside
    before = {path: norms[path].running_mean.clone() for path in norms}
    model(pictures())
    changed = {path for path in norms if not torch.equal(norms[path].running_mean, before[path])}
    assert changed == norms.keys() - inside != set()


# ------------------------------------------------------------------ compiled, in bfloat16, recomputed
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), [("swin", "fcn"), ("vit", "fcn")])
def test_compiled_networks_compute_the_same(kind, head):
    model, x = adapted(kind, head).train(), pictures()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found["out"], expected["out"])
    loss_of(found).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss_of(model(x)).backward()
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_bfloat16_autocast(kind, head):
    model, x = adapted(kind, head).train(), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    loss_of(found).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x)["out"].float()
    with torch.no_grad():
        whole = model(x)["out"]
    assert (half - whole).abs().mean() < 0.05 * whole.abs().mean()


@pytest.mark.parametrize("kind", ["swin", "vit", "convnext"])
def test_checkpointing_changes_no_gradient_and_keeps_less(kind):
    model, x = adapted(kind), pictures()

    def step():
        kept = []
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            maps = model.maps(x)
        sum(each.square().mean() for each in maps).backward()
        return sum(kept), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept, gradients = step()
    model.set_grad_checkpointing()
    kept_now, gradients_now = step()
    assert kept_now < 0.6 * kept
    assert gradients.keys() == gradients_now.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_now[name], gradient)
    model.set_grad_checkpointing(False)
    assert step()[0] == kept
