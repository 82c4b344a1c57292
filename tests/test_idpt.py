"""IDPT against a DGCNN of plain convolutions, and its published count of parameters."""

import pytest
import torch
from family_checks import adapted, assert_same_run
from models import MODELS
from test_family_points import clouds, make
from torch import nn

import deltalens as dl
from deltalens.methods.idpt import DynamicPrompt, EdgeConv
from deltalens.models.point_transformer import PointTransformer

WIDTH, NEAR = 24, 3


class Convolutions(nn.Module):
    """The published network with its names: all pairs of neighbours through a convolution of width 1."""

    def __init__(self):
        super().__init__()
        for number in (1, 2, 3):
            layer = nn.Sequential(nn.Conv2d(2 * WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.LeakyReLU(0.2))
            self.add_module(f"conv{number}", layer)
        self.conv5 = nn.Sequential(nn.Conv1d(3 * WIDTH, WIDTH, 1, bias=False), nn.BatchNorm1d(WIDTH), nn.LeakyReLU(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = []
        for layer in (self.conv1, self.conv2, self.conv3):
            near = torch.cdist(x, x).argsort(-1)[..., :NEAR]
            others = torch.stack([rows[index] for rows, index in zip(x, near, strict=True)])
            own = x.unsqueeze(2).expand_as(others)
            x = layer(torch.cat([others - own, own], -1).permute(0, 3, 1, 2)).amax(-1).transpose(1, 2)
            found.append(x)
        return self.conv5(torch.cat(found, -1).transpose(1, 2)).amax(-1)[:, None]


@pytest.fixture
def published() -> Convolutions:
    torch.manual_seed(2)
    network = Convolutions().double()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith("var") else torch.randn_like(tensor) / 3)
    return network.eval()


def official(network: Convolutions, model: nn.Module) -> dict[str, torch.Tensor]:
    """Its checkpoint, with a head of three vectors, and the norms a second time."""
    tensors = {f"module.blocks.cls.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {"module.blocks.cls.bn1.weight": network.conv1[1].weight, "module.norm.weight": torch.ones(WIDTH)}
    tensors["module.prompt_pos"] = torch.randn(1, 1, WIDTH).double()
    own = {name: torch.randn_like(tensor) for name, tensor in model.cls_head_finetune.state_dict().items()}
    tensors |= {f"module.cls_head_finetune.{name}": tensor for name, tensor in own.items()}
    return tensors | {f"module.cls_{kind}": torch.randn(1, 1, WIDTH).double() for kind in ("token", "pos")}


def test_the_network_is_the_published_one(published):
    model = dl.attach(make("mini").double(), dl.IDPTConfig(neighbours=NEAR))
    checkpoint = official(published, model)
    loaded, ignored = dl.import_official(model, checkpoint, "idpt")
    assert (loaded, ignored) == (4 * 6 + 1 + 2 + 2, 2)
    (prompt,) = model.blocks.blocks[0].delta.live("tokens.out")
    for mode in (False, True):
        x = torch.randn(4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = prompt.train(mode).prompt(x), published.train(mode)(y)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
        (found.square().sum() + expected.square().sum()).backward()
        torch.testing.assert_close(x.grad, y.grad, atol=1e-9, rtol=1e-9)
        own = prompt.edges[0].weight.grad
        torch.testing.assert_close(own, published.conv1[0].weight.grad.flatten(1), atol=1e-9, rtol=1e-9)
    assert prompt.norm.running_mean.allclose(published.conv5[1].running_mean)  # both have seen one batch
    assert torch.equal(prompt.position, checkpoint["module.prompt_pos"])
    assert not prompt.position.requires_grad


@pytest.mark.parametrize("kind", ["point-mae", "once"])
def test_the_prompt_is_read_by_the_last_block_and_the_head(kind):
    config = dl.IDPTConfig(neighbours=NEAR)
    model = adapted(make(kind).double(), config)
    plain = make(kind).double()

    def run(x):
        tokens, pos = plain.embed(*plain.group(x))
        tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), tokens], 1)
        pos = torch.cat([model.cls_pos.expand(len(x), -1, -1), pos], 1)
        x = plain.blocks.blocks[0](tokens + pos)
        (layer,) = model.blocks.blocks[0].delta.live("tokens.out")
        prompt = layer.prompt(x[:, 1:]) + layer.position
        x = x + pos if plain.pos_every_block else x
        x = plain.norm(plain.blocks.blocks[1](torch.cat([x[:, :1], prompt, x[:, 1:]], 1)))
        return model.cls_head_finetune(torch.cat([x[:, 0], x[:, 1], x[:, 2:].amax(1)], 1))

    assert_same_run(model, run, clouds().double())


def test_published_counts():
    for classes, expected in ((15, 1_696_783), (40, 1_703_208)):
        with torch.device("meta"):
            model = dl.attach(PointTransformer(classes), dl.IDPTConfig())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 9 * 24**2 + 8 * 24 + 3 * 120),
        ({"layers": 1}, 3 * 24**2 + 4 * 24 + 3 * 120),
        ({"layers": 0, "neighbours": 50}, 24**2 + 2 * 24 + 3 * 120),
        ({"train_position": True, "read_class": False}, 9 * 24**2 + 9 * 24 + 2 * 120),
        ({"read_prompt": False}, 9 * 24**2 + 8 * 24 + 2 * 120),
    ],
)
def test_what_each_switch_trains(settings, expected):
    model = dl.attach(make("mini"), dl.IDPTConfig(**{"neighbours": NEAR, **settings}))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected + 2 * 24 + 5
    assert model(clouds()).shape == (6, 5)


def test_tokens_of_others_are_not_read_as_patches():
    torch.manual_seed(0)
    layer, layout = DynamicPrompt(WIDTH, 1, NEAR, False).eval(), dl.describe(make()).towers[0].layout
    x = torch.randn(2, 1 + 5, WIDTH)
    with_others = layout.insert(x, torch.randn(1, 2, WIDTH))
    assert torch.equal(layer(x, layout)[:, 1], layer(with_others, layout)[:, 1])
    assert torch.equal(layer(with_others, layout)[:, 2:], with_others[:, 1:])


def test_neighbours_of_halves_are_found_in_float32():
    torch.manual_seed(0)
    layer, x = EdgeConv(WIDTH, NEAR).eval(), torch.randn(2, 5, WIDTH)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, atol=0.05, rtol=0.05)


def test_refused_where_impossible():
    small = {"dim": 24, "depth": 2, "heads": 2, "num_groups": 5, "group_size": 4, "encoder_dim": 24}
    with pytest.raises(TypeError, match="IDPT works on patches of point clouds"):
        dl.attach(MODELS["vit"](), dl.IDPTConfig())
    with pytest.raises(ValueError, match=r"neighbours=20 is more than the 5 patches of a cloud here: choose fewer"):
        dl.attach(make(), dl.IDPTConfig())
    with pytest.raises(ValueError, match="from 1 to 1 on this model of 2 blocks, got 2"):
        dl.attach(make(), dl.IDPTConfig(neighbours=3, block=2))
    with pytest.raises(ValueError, match="from 1 to 0"):
        dl.attach(PointTransformer(5, **{**small, "depth": 1}), dl.IDPTConfig(neighbours=3))
    with pytest.raises(ValueError, match="class_tokens="):
        dl.attach(PointTransformer(5, **small, class_tokens=()), dl.IDPTConfig(neighbours=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neighbours": 0}, "neighbours must be at least 1"),
        ({"layers": -1}, "layers must not be negative"),
        ({"block": 0}, "block must be at least 1"),
        ({"read_class": False, "read_prompt": False, "read_patches": False}, "must read something"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        dl.IDPTConfig(**settings)
