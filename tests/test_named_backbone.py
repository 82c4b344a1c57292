"""A backbone named by its path inside a larger model: everything around it is trained, saved and restored."""

import pytest
import torch
from models import images, randomize_adapter, tiny_swin
from torch import nn

import deltalens as dl
from deltalens.methods import BitFitConfig, LinearConfig, LoRAConfig, MonaConfig, VPTConfig

MONA = MonaConfig(bottleneck=4, dropout=0.0)


class Segmenter(nn.Module):
    """encoder.body is the backbone; a neck beside it, a head around it, a bare parameter, and no classifier."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"body": tiny_swin(num_classes=0), "neck": nn.Conv2d(24, 8, 1)})
        self.norm = nn.BatchNorm2d(8)
        self.classify = nn.Conv2d(8, 2, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x):
        y = self.encoder["body"].forward_features(x).permute(0, 3, 1, 2)
        return self.scale * self.classify(self.norm(self.encoder["neck"](y))) + self.offset


OUTSIDE = [
    "encoder.neck.bias",
    "encoder.neck.weight",
    "norm.bias",
    "norm.weight",
    "classify.bias",
    "classify.weight",
    "scale",
]


INSIDE = {
    "mona": MONA,
    "lora": LoRAConfig(r=2),
    "bitfit": BitFitConfig(),
    "linear": LinearConfig(),
    "vpt": VPTConfig(num_tokens=2),
}


def adapted_segmenter(method):
    """(model, images, plain output, adapted output), trained for one step of statistics."""
    model, x = Segmenter().eval(), images("swin")
    before = model(x)
    dl.attach(model, INSIDE[method], backbone="encoder.body")
    randomize_adapter(model)
    model.train()(x).sum().backward()
    return model.eval(), x, before, model(x).detach()


@pytest.mark.parametrize("method", INSIDE)
def test_everything_outside_a_named_backbone_is_trained_and_restored(method):
    pristine = Segmenter()
    torch.manual_seed(0)
    model, x, before, output = adapted_segmenter(method)
    assert {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("encoder.body")} == set(
        OUTSIDE
    )
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert int(model.norm.num_batches_tracked) == 1
    with dl.disable_adapter(model):
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), output)
    dl.detach(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in pristine.named_modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", INSIDE)
def test_what_is_outside_travels_in_the_file(method, tmp_path):
    model, x, _, output = adapted_segmenter(method)
    dl.save_pretrained(model, tmp_path)
    other = Segmenter()
    dl.load_adapter(other, tmp_path)
    assert torch.equal(other.eval()(x), output)


def test_outside_modules_with_buffers_follow_too():
    wrapper = Segmenter().eval()
    dl.attach(wrapper, MONA, name="a", backbone="encoder.body")
    dl.attach(wrapper, LoRAConfig(r=2), name="b")
    wrapper.double()
    dl.set_adapter(wrapper, "a")
    assert wrapper(images("swin").double()).dtype == torch.float64
