"""Seam: a text context that depends on the image (CoCoOp).

The context module sits in a slot of the text tower's owner, whose forward hands it the image features: nothing is
stored on modules between calls.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from clip_tiny import VECTORS, tiny_clip
from safetensors.torch import load_file
from torch import nn

import deltalens as dl
from deltalens.methods import LoRAConfig, Method, MonaConfig


class ConditionalContext(nn.Module):
    """text.context: positions 1..m of every class's embedding become ctx + meta_net(image feature)."""

    def __init__(self, context, width, image_width, hidden=2):
        super().__init__()
        self.ctx = nn.Parameter(context)
        self.meta_net = nn.Sequential()
        self.meta_net.linear1 = nn.Linear(image_width, hidden)
        self.meta_net.relu = nn.ReLU()
        self.meta_net.linear2 = nn.Linear(hidden, width)

    def forward(self, embeddings, image_features):
        """(classes, length, C), (images, D) -> (images, classes, length, C)."""
        context = self.ctx + self.meta_net(image_features)[:, None]
        images, classes, count = len(image_features), len(embeddings), len(self.ctx)
        embeddings = embeddings.expand(images, -1, -1, -1)
        context = context[:, None].expand(-1, classes, -1, -1)
        return torch.cat([embeddings[:, :, :1], context, embeddings[:, :, 1 + count :]], 2)


class CoCoOp(Method):
    name = "cocoop"

    def place(self, anatomy):
        for tower in anatomy.towers:
            if tower.name == "text":
                yield tower.owner, "text.context", ConditionalContext(torch.randn(4, 64) / 8, 64, 32)


@pytest.fixture
def adapted():
    model = tiny_clip()
    dl.attach(model, CoCoOp())
    return model


@pytest.fixture
def inputs():
    ids = torch.zeros(3, 77, dtype=torch.long)
    for row, end in enumerate((8, 10, 7)):
        ids[row, : end + 1] = torch.randint(1, 28, (end + 1,))
        ids[row, end] = 29
    return torch.randn(4, 3, 32, 32), ids


def test_every_image_has_its_own_text_features(adapted, inputs):
    images, ids = inputs
    (module,) = adapted.delta.live("text.context")
    plain = tiny_clip()
    expected = []
    for image in images:
        feature = F.normalize(plain.visual(image[None]), dim=-1)
        embeddings = plain.token_embedding(ids).clone()
        embeddings[:, 1:5] = module.ctx + module.meta_net(feature)
        x = plain.transformer(embeddings + plain.positional_embedding, plain.causal_mask(77))
        text = F.normalize(plain.ln_final(x)[torch.arange(3), ids.argmax(-1)] @ plain.text_projection, dim=-1)
        expected.append(plain.logit_scale.exp() * feature @ text.T)
    torch.testing.assert_close(adapted(images, ids), torch.cat(expected), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(expected[0], plain(images[:1], ids), atol=1e-3)


def test_only_the_context_learns(adapted, inputs):
    adapted(*inputs).sum().backward()
    trained = {name.rpartition("cocoop.")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {
        "ctx",
        "meta_net.linear1.weight",
        "meta_net.linear1.bias",
        "meta_net.linear2.weight",
        "meta_net.linear2.bias",
    }
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_switch_copy_and_detach(adapted, inputs):
    plain = tiny_clip()(*inputs)
    logits = adapted(*inputs)
    assert torch.equal(copy.deepcopy(adapted)(*inputs), logits)
    with dl.disable_adapter(adapted):
        torch.testing.assert_close(adapted(*inputs), plain, atol=5e-5, rtol=1e-4)
    dl.detach(adapted)
    assert torch.equal(adapted(*inputs), plain)
    assert not hasattr(adapted, "delta")


def test_both_towers_are_found_and_the_text_has_no_map(inputs):
    anatomy = dl.describe(tiny_clip())
    assert {tower.name: len(tower.blocks) for tower in anatomy.towers} == {"image": 4, "text": 4}
    with pytest.raises(TypeError, match=r"transformer\.resblocks\.0 .*plain sequence"):
        dl.attach(tiny_clip(), MonaConfig(bottleneck=4))
    with pytest.raises(TypeError, match=r"weights:q.*AttentionBlock"):
        dl.attach(tiny_clip(), LoRAConfig())


@pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")
def test_published_cocoop(adapted):
    vectors, inputs = load_file(VECTORS / "clip_cocoop.safetensors"), load_file(VECTORS / "clip_inputs.safetensors")
    (module,) = adapted.delta.live("text.context")
    module.load_state_dict({name.removeprefix("param."): v for name, v in vectors.items() if name.startswith("param.")})
    logits = adapted(inputs["images"], inputs["token_ids_compact"])
    torch.testing.assert_close(logits, vectors["logits"], atol=2e-5, rtol=1e-5)
    F.cross_entropy(logits, inputs["labels"]).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, vectors[f"grad.{name}"], atol=1e-6, rtol=1e-4)
