"""VPT's locations, depths, projection and pooling against the published implementation."""

import pytest
import reference
import torch
import torch.nn.functional as F
from test_reference_vpt import FEATURE, gradient_close, official, tiny_vit

import deltalens as dl
from deltalens.methods import VPTConfig

P5 = {"num_tokens": 5}
PIXELS = {"deep": False}
CASES = {
    "vpt_vit_deep_p5_imgprompt_pool": ({**P5, "pool": "patches+prompts"}, {}),
    "vpt_vit_deep_p5_prompt_pool": ({**P5, "pool": "prompts"}, {}),
    "vpt_vit_deep_p5_img_pool": ({**P5, "pool": "patches"}, {}),
    "vpt_vit_deep_p5_ndeep2": ({**P5, "depth": 2}, {}),
    "vpt_vit_deep_p5_ndeep2_noexpand": ({**P5, "depth": 2, "keep_prompts": False}, {}),
    "vpt_vit_deep_p5_ndeep2_reverse_INTENDED": ({**P5, "depth": 2, "reverse": True}, {}),
    "vpt_vit_deep_p5_shared": ({**P5, "shared": "inter"}, {}),
    "vpt_vit_deep_p5_project24": ({**P5, "project": 24}, {}),
    "vpt_vit_shallow_p5_project24": ({**P5, "project": 24, "deep": False}, {}),
    "vpt_vit_add_shallow": ({"location": "add", "deep": False}, {}),
    "vpt_vit_add_deep": ({"location": "add"}, {}),
    "vpt_vit_add1_shallow": ({"location": "add-1", "deep": False}, {}),
    "vpt_vit_add1_deep": ({"location": "add-1"}, {}),
    "vpt_vit_prepend_pixel_p3": ({**PIXELS, "num_tokens": 3, "location": "prepend-pixel"}, {}),
    "vpt_vit_below_p1": ({**PIXELS, "num_tokens": 1, "location": "concat-channel"}, {}),
    "vpt_vit_pad_p8": ({**PIXELS, "num_tokens": 8, "location": "padding"}, {"dynamic_img_size": True}),
    "vpt_mae_deep_p5": ({**P5, "pool": "patches+prompts"}, {"global_pool": "avg", "fc_norm": True}),
    "vpt_mae_shallow_p5": (
        {**P5, "pool": "patches+prompts", "deep": False},
        {"global_pool": "avg", "fc_norm": True},
    ),
    "vpt_mae_deep_p5_img_pool": ({**P5, "pool": "patches"}, {"global_pool": "avg", "fc_norm": True}),
}


def imported(name):
    """(adapted model with the official tensors, tensors of the case)."""
    settings, options = CASES[name]
    tensors, _ = reference.load(name)
    model = dl.attach(tiny_vit(**options), VPTConfig(**settings)).eval()
    dl.import_official(model, official(tensors), source="vpt")
    return model, tensors


def official_gradients(model, name) -> dict[str, torch.Tensor]:
    """Gradients of the adapter by the official names of what they belong to."""
    found, rows = {}, []
    for path, parameter in model.named_parameters():
        if ".vpt." not in path:
            continue
        leaf = path.rpartition(".vpt.")[2]
        if leaf == "embedding":
            rows.append(parameter.grad)
        elif leaf.startswith("project"):
            found[f"prompt_proj.{leaf.rpartition('.')[2]}"] = parameter.grad
        elif leaf in ("tb", "lr"):
            found[f"prompt_embeddings_{leaf}"] = parameter.grad
        elif leaf in ("pixels", "image"):
            found["prompt_embeddings"] = parameter.grad
        else:
            colours = model.patch_embed.proj.weight.grad
            found["embeddings.patch_embeddings.weight"] = torch.cat([colours, parameter.grad], 1)
    if rows and "reverse" in name:
        found["deep_prompt_embeddings"] = torch.stack(rows)
    elif rows:
        found["prompt_embeddings"] = rows[0][None]
        if len(rows) > 1:
            found["deep_prompt_embeddings"] = torch.stack(rows[1:])
    return found


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name, monkeypatch):
    model, tensors = imported(name)
    if "pad" in name:  # the fixture has position embeddings of its own for the larger grid; timm would resize
        of_grid = tensors["repo.enc.transformer.embeddings.position_embeddings"]
        monkeypatch.setattr("timm.models.vision_transformer.resample_abs_pos_embed", lambda *args, **kwargs: of_grid)
    x = tensors["input.image"]
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, tensors["out.feature"], **FEATURE)
    logits = model(x)
    torch.testing.assert_close(logits, tensors["out.logits"], **FEATURE)
    F.cross_entropy(logits, tensors["input.target"]).backward()
    grads = reference.sub(tensors, "grad.enc.")
    grads = {key.removeprefix("transformer."): tensor for key, tensor in grads.items()}
    grads.pop("embeddings.position_embeddings", None)  # frozen: the fixture has it for information
    found = official_gradients(model, name)
    assert found.keys() == grads.keys()
    for key, expected in grads.items():
        gradient_close(found[key], expected)
    for leaf in ("weight", "bias"):
        if f"grad.head.last_layer.{leaf}" in tensors:
            gradient_close(getattr(model.head, leaf).grad, tensors[f"grad.head.last_layer.{leaf}"])


def test_the_reversed_depth_does_not_replace_patches():
    """The official code drops the first five patches at the first prompted block; ours is what it means to do."""
    bug, _ = reference.load("vpt_vit_deep_p5_ndeep2_reverse")
    model, intended = imported("vpt_vit_deep_p5_ndeep2_reverse_INTENDED")
    for key in ("repo.enc.transformer.deep_prompt_embeddings", "input.image"):
        assert torch.equal(bug[key], intended[key])
    assert (model(bug["input.image"]) - bug["out.logits"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vpt_vit_deep_p5_ndeep2", {"num_tokens": 5, "depth": 3}, "depth=2"),
        ("vpt_vit_deep_p5", {"deep": False, "num_tokens": 3, "location": "prepend-pixel"}, "is .* expected"),
        ("vpt_vit_deep_p5", {"deep": False, "num_tokens": 8, "location": "concat-channel"}, "no .*patch_embeddings"),
        ("vpt_vit_deep_p5", {"num_tokens": 4}, "another shape"),
        ("vpt_vit_deep_p5_project24", {"num_tokens": 5, "project": 12}, "another shape"),
        ("vpt_vit_deep_p5", {"num_tokens": 5, "project": 24}, "missing: .*project"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(name, settings, message):
    tensors, _ = reference.load(name)
    model = dl.attach(tiny_vit(), VPTConfig(**settings))
    with pytest.raises(ValueError, match=message):
        dl.import_official(model, official(tensors), source="vpt")


def test_shared_prompts_are_the_first_ones_of_a_checkpoint():
    """With DEEP_SHARED the checkpoint holds deep prompts that no block reads."""
    tensors, _ = reference.load("vpt_vit_deep_p5")
    shared = dl.attach(tiny_vit(), VPTConfig(num_tokens=5, shared="inter")).eval()
    loaded, ignored = dl.import_official(shared, official(tensors), source="vpt")
    assert (loaded, ignored) == (1 + 2, 0)
    deep = dl.attach(tiny_vit(), VPTConfig(num_tokens=5)).eval()
    dl.import_official(deep, official(tensors), source="vpt")
    first = official(tensors)["enc.transformer.prompt_embeddings"][0]
    for path, parameter in deep.named_parameters():
        if path.endswith("embedding"):
            parameter.data.copy_(first)
    torch.testing.assert_close(shared(tensors["input.image"]), deep(tensors["input.image"]))


def test_fixed_prompts_are_imported_too():
    tensors, _ = reference.load("vpt_vit_deep_p5")
    model = dl.attach(tiny_vit(), VPTConfig(num_tokens=5, train_prompts=False)).eval()
    dl.import_official(model, official(tensors), source="vpt")
    torch.testing.assert_close(model(tensors["input.image"]), tensors["out.logits"], **FEATURE)
