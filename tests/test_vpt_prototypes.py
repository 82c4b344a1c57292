"""Prompts that start from class prototypes."""

import copy

import pytest
import torch
from models import images, randomize_adapter, tiny_swin, tiny_vit

import deltalens as dl
from deltalens.methods import BitFitConfig, VPTConfig
from deltalens.methods.vpt_prototypes import block_means

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2])


def loader(x=None, batch=3):
    x = images("vit", batch=len(LABELS)) if x is None else x
    return [(x[i : i + batch], LABELS[i : i + batch]) for i in range(0, len(x), batch)]


def by_hand(model, x, token):
    """(classes, blocks + 1, C): the stream before block 0 and after each block, one image at a time."""
    found = []
    for image in x:
        stream = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
        entries = [token(stream)]
        for block in model.blocks:
            stream = block(stream)
            entries.append(token(stream))
        found.append(torch.cat(entries))
    found = torch.stack(found)
    return torch.stack([found[label == LABELS].mean(0) for label in range(3)])


def class_token(stream):
    return stream[:, 0]


def mean_token(stream):
    return stream.mean(1)


@pytest.mark.parametrize(
    ("options", "token"),
    [
        ({}, class_token),
        ({"reg_tokens": 2, "global_pool": "avg"}, class_token),
        ({"class_token": False, "global_pool": "avg"}, mean_token),
    ],
)
def test_prototypes_are_means_of_classes(options, token):
    model, x = tiny_vit(**options), images("vit", batch=len(LABELS))
    expected = by_hand(model, x, token)
    torch.testing.assert_close(dl.class_prototypes(model, loader()).float(), expected, atol=1e-5, rtol=1e-4)
    one_by_one = dl.class_prototypes(model, loader(batch=1))
    torch.testing.assert_close(one_by_one.float(), expected, atol=1e-5, rtol=1e-4)
    dl.attach(model.train(), [VPTConfig(num_tokens=2), BitFitConfig()])  # switched off meanwhile
    torch.testing.assert_close(dl.class_prototypes(model, loader()).float(), expected, atol=1e-5, rtol=1e-4)
    assert model.training
    assert dl.active_adapters(model) == ("default",)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("init", "entries"), [("final-cls", [3, 3, 3]), ("cls-nolastl", [0, 1, 2]), ("cls-nofirstl", [1, 2, 3])]
)
def test_where_prompts_start(init, entries, trained):
    model = tiny_vit()
    prototypes = dl.class_prototypes(model, loader()).float()
    config = VPTConfig(num_tokens=3, init=init, train_prompts=trained)
    dl.attach(model, config)
    with pytest.raises(RuntimeError, match=r"call deltalens\.prepare"):
        model(images("vit"))
    config.prepare(model, loader())
    for block, entry in zip(model.blocks, entries, strict=True):
        (module,) = block.delta.live("attention.prompts")
        assert isinstance(module.embedding, torch.nn.Parameter) == trained
        torch.testing.assert_close(module.embedding.detach(), prototypes[:, entry], atol=1e-6, rtol=1e-6)
    model(images("vit")).sum().backward()


def test_partial_depth_counts_from_where_it_is():
    model = tiny_vit()
    prototypes = dl.class_prototypes(model, loader()).float()
    config = VPTConfig(num_tokens=3, init="cls-nolastl", depth=2, reverse=True)
    dl.attach(model, config)
    config.prepare(model, loader())
    embeddings = [p.detach() for name, p in model.named_parameters() if name.endswith("embedding")]
    torch.testing.assert_close(torch.stack(embeddings), prototypes[:, 1:3].transpose(0, 1), atol=1e-6, rtol=1e-6)


def test_preparing_twice_keeps_what_is_there(tmp_path):
    """Trained prompts, also those of a file, are not started again; copies and files of waiting ones still wait."""
    model, config = tiny_vit(), VPTConfig(num_tokens=3, init="final-cls")
    dl.attach(model, config)
    dl.save_pretrained(model, tmp_path / "waiting")
    with pytest.raises(RuntimeError, match="class prototypes"):
        dl.from_pretrained(tmp_path / "waiting", model=tiny_vit())(images("vit"))
    with pytest.raises(RuntimeError, match="class prototypes"):
        copy.deepcopy(model)(images("vit"))
    config.prepare(model, loader())
    randomize_adapter(model)
    expected = model(images("vit"))
    config.prepare(model, loader())
    assert torch.equal(model(images("vit")), expected)
    dl.save_pretrained(model, tmp_path / "trained")
    again = dl.from_pretrained(tmp_path / "trained", model=tiny_vit())
    config.prepare(again, loader())
    assert torch.equal(again(images("vit")), expected)


def test_only_the_active_adapter_is_prepared():
    model, config = tiny_vit(), VPTConfig(num_tokens=3, init="final-cls")
    dl.attach(model, config, name="first")
    dl.attach(model, config, name="second")
    config.prepare(model, loader())
    model(images("vit"))
    dl.set_adapter(model, "first")
    with pytest.raises(RuntimeError, match="class prototypes"):
        model(images("vit"))


def test_on_swin_each_block_has_its_width():
    model, x = tiny_swin(), images("swin", batch=len(LABELS))
    with pytest.raises(TypeError, match="differ in width"):
        dl.class_prototypes(model, loader(x))
    first = model.patch_embed(x).flatten(1, 2).mean(1)
    means = block_means(model, loader(x))[0]
    expected = torch.stack([first[label == LABELS].mean(0) for label in range(3)])
    torch.testing.assert_close(means.inputs[0].float(), expected, atol=1e-5, rtol=1e-4)
    for init in ("cls-nolastl", "cls-nofirstl"):
        adapted, config = tiny_swin(), VPTConfig(num_tokens=3, init=init)
        dl.attach(adapted, config)
        config.prepare(adapted, loader(x))
        found = [p.detach() for name, p in adapted.named_parameters() if name.endswith("embedding")]
        wanted = means.inputs if init == "cls-nolastl" else means.outputs
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=1e-6)


def test_wrong_numbers_of_classes_are_named():
    config = VPTConfig(num_tokens=5, init="final-cls")
    with pytest.raises(ValueError, match=r"3 classes.*num_tokens is 5; set num_tokens=3"):
        config.prepare(dl.attach(tiny_vit(), config), loader())
    x = images("vit")
    with pytest.raises(ValueError, match="none of class 1"):
        dl.class_prototypes(tiny_vit(), [(x, torch.tensor([0, 2]))])
    with pytest.raises(ValueError, match="every class"):
        dl.class_prototypes(tiny_vit(), [])
