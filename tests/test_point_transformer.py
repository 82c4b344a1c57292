"""The point transformer against the published implementation's numbers, names and counts."""

import ast

import pytest
import reference
import torch
from published_points import published_shape
from torch import nn

from deltalens.models.point_mae import PointMAE
from deltalens.models.point_ops import chamfer_distance, farthest_points, group_points, nearest_points, take_points
from deltalens.models.point_transformer import MiniPointNet, PointHead, PointTransformer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
TINY = {
    "dim": 24,
    "depth": 2,
    "heads": 2,
    "num_groups": 6,
    "group_size": 4,
    "encoder_dim": 24,
}


def clouds(batch: int = 2, points: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, points, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def published():
    """(tensors of the fixture, model with its weights)."""
    tensors, metadata = reference.load("pointmae_tiny")
    config = ast.literal_eval(metadata["config"].replace("true", "True").replace("false", "False"))
    model = published_shape(config).eval()
    model.load_state_dict(reference.sub(tensors, "state."))  # strict: the official names, no more and no less
    return tensors, model


# ------------------------------------------------------------------ the published numbers
def test_sampling_and_grouping_reproduce_the_published_indices(published):
    tensors, model = published
    points = tensors["input.points"]
    assert torch.equal(farthest_points(points, 16), tensors["output.fps_idx"])
    assert torch.equal(farthest_points(points, 16, skip_origin=False), tensors["output.fps_idx_noskip"])
    assert not torch.equal(tensors["output.fps_idx"], tensors["output.fps_idx_noskip"])
    groups, centres = model.group(points)
    assert torch.equal(centres, tensors["output.center"])
    assert torch.equal(nearest_points(points, centres, 8), tensors["output.group_idx"])
    assert torch.equal(groups, tensors["output.neighborhood"])


def test_the_near_origin_rule_on_a_ring():
    tensors, _ = reference.load("fps_ring")
    assert torch.equal(farthest_points(tensors["points"], 12), tensors["fps_idx_pointnet2_ops"])
    assert torch.equal(farthest_points(tensors["points"], 12, skip_origin=False), tensors["fps_idx_noskip"])


@torch.no_grad()
def test_every_published_intermediate_is_reproduced(published):
    tensors, model = published
    seen = {}
    for number, block in enumerate(model.blocks.blocks):
        block.register_forward_hook(lambda _, __, y, number=number: seen.__setitem__(f"block{number}", y))
    groups, centres = model.group(tensors["input.points"])
    tokens, pos = model.embed(groups, centres)
    normed = model.encode(tokens, pos)
    seen |= {"tokens": tokens, "pos": pos, "normed": normed, "logits": model(tensors["input.points"])}
    for name, found in seen.items():
        torch.testing.assert_close(found, tensors[f"output.{name}"], **TOLERANCE, msg=name)


@torch.no_grad()
def test_positions_once_or_before_every_block_differ(published):
    tensors, model = published
    model.pos_every_block = False
    once = model(tensors["input.points"])
    model.pos_every_block = True
    assert (once - tensors["output.logits"]).abs().max() > 1e-3


# ------------------------------------------------------------------ the published names and counts
def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def test_names_and_shapes_are_the_official_ones():
    keys = reference.load_json("pointmae_keys")
    with torch.device("meta"):
        model, autoencoder = PointTransformer(15), PointMAE(num_groups=64)
    assert shapes(model) == keys["finetune"]
    assert shapes(autoencoder) == keys["pretrain"]


@pytest.mark.parametrize(("classes", "expected"), [(15, 22_093_327), (40, 22_099_752)])
def test_parameter_count_of_the_published_classifier(classes, expected):
    with torch.device("meta"):
        model = PointTransformer(classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(parameter.numel() for parameter in model.get_classifier().parameters()) == 267_535 + 257 * (classes - 15)


def test_parameter_count_of_the_autoencoder():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in PointMAE().parameters()) == 29_006_432


# ------------------------------------------------------------------ sampling
def test_farthest_points_follow_the_definition():
    points = clouds(3, 30)
    found = farthest_points(points, 10, skip_origin=False)
    for cloud, chosen in zip(points, found, strict=True):
        taken = [0]
        while len(taken) < 10:
            distances = (cloud[:, None] - cloud[taken]).square().sum(-1).amin(1)
            taken.append(int(distances.argmax()))
        assert chosen.tolist() == taken


def test_indices_repeat_where_only_points_near_the_origin_are_left():
    points = torch.zeros(1, 5, 3)
    points[0, 1], points[0, 3] = torch.tensor([1.0, 0, 0]), torch.tensor([0, 2.0, 0])
    assert farthest_points(points, 5).tolist() == [[0, 3, 1, 1, 1]]
    assert farthest_points(points[:, :1], 3).tolist() == [[0, 0, 0]]


def test_neighbours_are_sorted_and_begin_with_the_centre():
    points = clouds()
    centres = take_points(points, farthest_points(points, 5))
    index = nearest_points(points, centres, 7)
    assert torch.equal(take_points(points, index)[:, :, 0], centres)
    distance = (take_points(points, index) - centres[:, :, None]).square().sum(-1)
    assert (distance.diff(dim=2) >= 0).all()
    every = torch.cdist(centres.double(), points.double()).sort(-1).values[..., :7]
    torch.testing.assert_close(distance.sqrt().double(), every, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 3), (2, 40, 6), (2, 0, 3)])
def test_other_shapes_than_batches_of_clouds_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, N, 3\)"):
        farthest_points(torch.zeros(shape), 4)


def test_clouds_smaller_than_a_patch_are_refused():
    with pytest.raises(ValueError, match="cloud of 3 points has no 4 neighbours"):
        PointTransformer(2, **TINY)(clouds(points=3))


def test_grouping_reads_coordinates_in_full_precision():
    points = clouds(points=200)
    with torch.autocast("cpu", torch.bfloat16):
        groups, centres = group_points(points, 20, 8)
    expected = group_points(points, 20, 8)
    assert groups.dtype == torch.float32
    assert torch.equal(groups, expected[0])
    assert torch.equal(centres, expected[1])


# ------------------------------------------------------------------ the family of models
def test_the_maximum_of_a_patch_is_multiplied_once():
    """Equal to the layer on [maximum, own], in values, statistics and gradients; and where a hook is there, the layer
    itself is called."""
    nets = [MiniPointNet(24, (8, 16)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].second_conv[0].register_forward_hook(lambda layer, args, out: seen.append(args[0].shape))
    groups, seen = torch.randn(2, 5, 7, 3, dtype=torch.float64), []
    found = [net(groups) for net in nets]
    assert seen == [(10, 32, 7)]
    for each in found:
        each.square().sum().backward()
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)
    for fast, plain in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(fast.grad, plain.grad, atol=1e-10, rtol=0)
    for fast, plain in zip(*(net.buffers() for net in nets), strict=True):
        torch.testing.assert_close(fast, plain)


def test_point_bert_reduces_its_patches_and_has_a_head_without_batch_norm():
    model = PointTransformer(3, **TINY | {"encoder_dim": 16}, head="mlp").eval()
    assert {"reduce_dim.weight", "cls_head_finetune.0.weight", "cls_head_finetune.3.weight"} <= set(model.state_dict())
    assert model.reduce_dim.weight.shape == (24, 16)
    assert model(clouds()).shape == (2, 3)


def test_recon_reads_three_class_tokens_that_patches_do_not_see():
    model = PointTransformer(3, **TINY, class_tokens=("cls", "img", "text"), two_streams=True).eval()
    assert model.get_classifier().in_features == 4 * 24
    with torch.no_grad():
        before = model.forward_features(clouds())
        model.img_token.add_(1)
        after = model.forward_features(clouds())
    assert model(clouds()).shape == (2, 3)
    assert torch.equal(before[:, 3:], after[:, 3:])
    assert not torch.allclose(before[:, 1], after[:, 1])
    assert torch.equal(before[:, 0], after[:, 0])  # nor do class tokens see each other


def test_recons_block_follows_its_formula():
    model = PointTransformer(3, **TINY, class_tokens=("cls", "img", "text"), two_streams=True).double().eval()
    block = model.blocks.blocks[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    c, v = block.norm1_contrast(x[:, :3]), block.norm1(x[:, 3:])
    k, w = block.attn_contrast.kv(v).chunk(2, -1)
    heads = []
    for start in (0, 12):
        part = slice(start, start + 12)
        scores = block.attn_contrast.q(c)[..., part] @ k[..., part].transpose(1, 2) / 12**0.5
        heads.append(scores.softmax(-1) @ w[..., part])
    c = c + block.attn_contrast.proj(torch.cat(heads, -1))
    v = v + block.attn(v)
    c, v = block.norm2_contrast(c), block.norm2(v)
    expected = torch.cat([c + block.mlp_contrast(c), v + block.mlp(v)], 1)
    torch.testing.assert_close(block(x), expected, atol=1e-10, rtol=1e-10)


def test_without_classes_features_come_out():
    assert PointTransformer(0, **TINY).eval()(clouds()).shape == (2, 48)


def test_a_head_of_the_same_kind_for_other_classes():
    for kind in ("mlp-bn", "mlp", "linear"):
        fresh = PointHead(8, 5, kind).double().with_classes(3)
        assert fresh.out_features == 3
        assert fresh[-1].weight.dtype == torch.float64
    with pytest.raises(ValueError, match="head must be one of"):
        PointHead(8, 5, "cosine")


def test_class_tokens_drawn_with_a_seed_are_always_the_same():
    one, other = PointTransformer(2, **TINY), PointTransformer(2, **TINY)
    assert not torch.equal(one.cls_token, other.cls_token)
    for model in (one, other):
        model.init_class_tokens(seed=0)
    assert torch.equal(one.cls_token, other.cls_token)
    assert torch.equal(one.cls_pos, other.cls_pos)
    assert not torch.equal(one.cls_token, one.cls_pos)


# ------------------------------------------------------------------ the autoencoder
def test_the_autoencoder_hides_sixty_per_cent_and_learns():
    torch.manual_seed(0)
    model = PointMAE(**TINY | {"num_groups": 10}, decoder_depth=1, decoder_heads=2, drop_path=0.0)
    points = clouds(4)
    rebuilt, wanted = model.rebuild(*model.MAE_encoder.group(points))
    assert rebuilt.shape == wanted.shape == (4, 6, 4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [name for name in untouched if not name.endswith("first_conv.0.bias")] == []


def test_hidden_patches_do_not_reach_the_encoder():
    torch.manual_seed(0)
    model = PointMAE(**TINY, decoder_depth=1, decoder_heads=2).eval()
    groups, centres = model.MAE_encoder.group(clouds())
    torch.manual_seed(5)
    rebuilt, wanted = model.rebuild(groups, centres)
    for number in range(groups.shape[1]):
        changed = groups.clone()
        changed[:, number] += 1
        torch.manual_seed(5)
        again, target = model.rebuild(changed, centres)
        for sample in range(2):
            hidden = not torch.equal(target[sample], wanted[sample])
            assert torch.equal(again[sample], rebuilt[sample]) == hidden


def test_chamfer_distance_of_two_small_sets():
    found = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    wanted = torch.tensor([[[0.0, 0, 0], [3, 0, 0]]])
    assert float(chamfer_distance(found, wanted)) == pytest.approx((0 + 1) / 2 + (0 + 4) / 2)
