"""Several prompt sets in one forward pass are what they are one after the other."""

import pytest
import torch
from models import CLASSES, images, randomize_adapter, tiny_swin, tiny_vit

import deltalens as dl
from deltalens.studies.ensemble import all_prompt_sets, ensemble_logits, ensemble_probabilities

SETS = ("first", "second", "third")
FORMS = {
    "deep": dl.VPTConfig(num_tokens=3),
    "shallow": dl.VPTConfig(num_tokens=3, deep=False),
    "prefix": dl.VPTConfig(num_tokens=3, location="prefix"),
    "add": dl.VPTConfig(location="add"),
    "two blocks": dl.VPTConfig(num_tokens=2, depth=2),
}


def model_with_sets(build, config, names=SETS):
    model = build()
    for seed, name in enumerate(names):
        dl.attach(model, config, name)
        randomize_adapter(model, seed + 1)
    return model.double().eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_one_pass_equals_one_after_the_other(build, form):
    model = model_with_sets(build, FORMS[form])
    x = images("vit", batch=4).double()
    expected = []
    for name in SETS:
        dl.set_adapter(model, name)
        expected.append(model(x).detach())
    together = ensemble_logits(model, x, SETS)
    assert together.shape == (3, 4, CLASSES)
    torch.testing.assert_close(together, torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    probabilities = ensemble_probabilities(model, x, SETS)
    mean = torch.stack([each.float().softmax(-1) for each in expected]).mean(0)
    torch.testing.assert_close(probabilities, mean)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    order = ensemble_logits(model, x, ("third", "first"))
    torch.testing.assert_close(order, torch.stack([expected[2], expected[0]]), rtol=1e-10, atol=1e-10)


def test_it_is_one_pass():
    model = model_with_sets(tiny_vit, FORMS["deep"])
    seen = []
    model.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    ensemble_logits(model, images("vit", batch=4).double(), SETS)
    assert seen == [12]


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_the_model_is_as_before(build):
    model = model_with_sets(build, FORMS["deep"])
    dl.set_adapter(model, ("first", "second"))
    x = images("vit").double()
    before, names = model(x), {name: id(p) for name, p in model.named_parameters()}
    ensemble_logits(model, x, SETS)
    with pytest.raises(RuntimeError, match="stop"), all_prompt_sets(model, SETS):
        raise RuntimeError("stop")
    assert dl.active_adapters(model) == ("first", "second")
    assert torch.equal(model(x), before)
    assert {name: id(p) for name, p in model.named_parameters()} == names
    dl.detach(model)
    assert torch.equal(model(x), build().double()(x))


def test_what_cannot_be_an_ensemble_is_said():
    x = images("vit")
    model = tiny_vit()
    dl.attach(model, dl.VPTConfig(num_tokens=3), "vpt")
    dl.attach(model, dl.LoRAConfig(r=2), "lora")
    dl.attach(model, dl.BitFitConfig(), "bias")
    dl.attach(model, dl.LinearConfig(), "linear")
    dl.attach(model, dl.VPTConfig(num_tokens=3, deep=False), "shallow")
    dl.attach(model, dl.VPTConfig(num_tokens=4), "four")
    dl.attach(model, dl.VPTConfig(num_tokens=3), "seven", num_classes=7)
    for others, message in (
        (("vpt", "lora"), "adapter 'lora' has modules in "),
        (("vpt", "bias"), "adapter 'bias' has tensors of the backbone|adapter 'bias' has no prompts"),
        (("vpt", "linear"), "adapter 'linear' has no prompts"),
        (("vpt", "shallow"), "different blocks or slots"),
        (("vpt", "four"), r"same number of prompts, got \[3, 4\]"),
        (("vpt", "seven"), "different numbers of classes"),
        (("vpt", "nobody"), "needs names of different adapters"),
        (("vpt", "vpt"), "needs names of different adapters"),
        ((), "got none"),
    ):
        with pytest.raises(ValueError, match=message):
            ensemble_logits(model, x, others)
        assert dl.active_adapters(model) == ("seven",)
    assert torch.isfinite(model(x)).all()
