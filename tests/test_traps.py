"""Traps that parameter-efficient tuning of vision models is known for: each is refused with the reason, or works."""

import pytest
import torch
import torch.distributed as dist
from models import CLASSES, images, randomize, randomize_adapter, tiny_swin, tiny_vit
from torch import nn

import deltalens as dl
from deltalens.methods import BitFitConfig, FullConfig, LinearConfig, LoRAConfig, Method, MonaConfig, SSFConfig


class AttentionBlock(nn.Module):
    """A block of no known family around nn.MultiheadAttention, as many networks have."""

    def __init__(self, width=12):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x):
        normed = self.norm(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    pretrained_cfg = {"input_size": (3, 32, 32)}

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.blocks = nn.ModuleList([AttentionBlock(), AttentionBlock()])
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def transformer():
    return randomize(Transformer()).eval()


# ------------------------------------------------------------------ layers that are not called
@pytest.mark.parametrize("target", ["attn.out_proj", r".*attn\.out_proj"])
def test_a_projection_that_its_parent_bypasses_is_refused(target):
    """nn.MultiheadAttention reads its weight itself: LoRA there would train nothing, and change the merged model."""
    with pytest.raises(ValueError, match=r"out_proj.*MultiheadAttention|MultiheadAttention.*out_proj"):
        dl.attach(transformer(), LoRAConfig(r=2, target_modules=target if "*" in target else (target,)))


def test_methods_on_all_linear_layers_leave_a_bypassed_one_alone_or_act():
    """Merging changes nothing, as it would where a method sat on a layer that is never called."""
    model, x = transformer(), images("vit")
    dl.attach(model, [SSFConfig(), MonaConfig(bottleneck=4)])
    randomize_adapter(model)
    expected = model.eval()(x)
    expected.sum().backward()
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    torch.testing.assert_close(dl.merge_and_unload(model)(x), expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ heads and classes
CONFIGS = [MonaConfig(bottleneck=4), LoRAConfig(r=2), BitFitConfig(), FullConfig(), LinearConfig(), SSFConfig()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_head_is_always_trained_and_saved(config, tmp_path):
    model = dl.attach(tiny_vit(), config, num_classes=3)
    assert all(p.requires_grad for p in model.head.parameters())
    head = model.head.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model(images("vit")), torch.tensor([0, 2])).backward()
    before = head.detach().clone()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)
    dl.save_pretrained(model, tmp_path)
    loaded = dl.from_pretrained(tmp_path, tiny_vit())
    assert torch.equal(loaded.head.weight, head)
    assert torch.equal(loaded(images("vit")), model.eval()(images("vit")))


def test_another_number_of_classes_brings_the_saved_head_along(tmp_path):
    dl.save_pretrained(randomize_adapter(dl.attach(tiny_vit(), LoRAConfig(r=2), num_classes=3)), tmp_path)
    loaded = dl.from_pretrained(tmp_path, tiny_vit(num_classes=11))
    assert loaded(images("vit")).shape == (2, 3)
    extractor = dl.from_pretrained(tmp_path, tiny_vit(num_classes=0))
    assert extractor(images("vit")).shape == (2, 24)  # a network without a head takes the rest


# ------------------------------------------------------------------ names
@pytest.mark.parametrize("make", [tiny_vit, tiny_swin], ids=["vit", "swin"])
@pytest.mark.parametrize("config", [LoRAConfig(r=2), MonaConfig(bottleneck=4), SSFConfig()], ids=lambda c: c.name)
def test_the_backbone_keeps_its_names(make, config):
    from timm.models import group_parameters

    plain, model = make(), dl.attach(make(), config)
    names = [name for name in model.state_dict() if "delta" not in name.split(".")]
    assert names == list(plain.state_dict())
    assert [name for name, m in model.named_modules() if "delta" not in name.split(".")] == [
        name for name, _ in plain.named_modules()
    ]
    for each in (plain, model):
        each.groups = {
            name: group for group, members in group_parameters(each, each.group_matcher()).items() for name in members
        }
    assert model.groups.items() >= plain.groups.items()
    inserted = {name: group for name, group in model.groups.items() if name not in plain.groups}
    assert inserted
    for name, group in inserted.items():  # layer decay: a module has the rate of the block or layer it sits in
        owner = name.partition(".delta.")[0]
        beside = {plain.groups[other] for other in plain.groups if other.startswith(f"{owner}.")}
        assert group in beside


def test_a_plain_checkpoint_still_loads_and_a_backbone_can_be_taken_out():
    plain = tiny_vit().state_dict()
    model = dl.attach(tiny_vit(), MonaConfig(bottleneck=4))
    report = model.load_state_dict(plain, strict=False)
    assert all("delta" in name.split(".") for name in report.missing_keys)
    assert report.unexpected_keys == []


# ------------------------------------------------------------------ policies that match class names
FAMILIES = {
    "vit": (tiny_vit, "Block", 3),
    "swin": (tiny_swin, "SwinTransformerBlock", 4),
    "unknown": (transformer, "AttentionBlock", 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_policies_find_swapped_blocks_by_name_and_class(family):
    from accelerate.utils.dataclasses import get_module_class_from_name
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    make, name, count = FAMILIES[family]
    plain_class = {type(m).__name__: type(m) for m in make().modules()}[name]
    model = dl.attach(make(), MonaConfig(bottleneck=4))
    blocks = [m for m in model.modules() if type(m).__name__ == name]
    assert len(blocks) == count
    found = get_module_class_from_name(model, name)
    assert issubclass(found, plain_class)
    for wanted in (found, plain_class):
        chosen = [
            m for m in model.modules()
            if transformer_auto_wrap_policy(m, recurse=False, nonwrapped_numel=1, transformer_layer_cls={wanted})
        ]  # fmt: skip
        assert chosen == blocks


# ------------------------------------------------------------------ FSDP
class Shared(Method):
    """One linear layer for all blocks."""

    name = "sharedlayer"

    def place(self, anatomy):
        layer = nn.Linear(anatomy.blocks()[0].width, anatomy.blocks()[0].width)
        for block in anatomy.blocks():
            yield block, "block.stream", layer


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A process group of this process alone."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model, by_block=True):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks if by_block else ():
        fully_shard(block)
    return fully_shard(model)


def sharded_as_a_whole(model):
    """FSDP shards a parameter in one group only: modules that blocks share need one group for all of them."""
    return sharded(model, by_block=False)


@pytest.mark.parametrize(
    "config", [MonaConfig(bottleneck=4, dropout=0.0), LoRAConfig(r=2), Shared()], ids=lambda c: c.name
)
def test_attach_then_shard_trains_as_on_one_device(config, one_rank, tmp_path):
    x, labels = images("vit"), torch.tensor([0, 3])
    losses = []
    for prepare in (lambda model: model, sharded_as_a_whole if isinstance(config, Shared) else sharded):
        torch.manual_seed(0)
        model = dl.attach(tiny_vit(), config)
        model = prepare(randomize_adapter(model)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        taken = []
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            taken.append(float(loss.detach()))
        losses.append(taken)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][2]


def test_attach_after_sharding_is_refused(one_rank):
    model = sharded(tiny_vit())
    with pytest.raises(TypeError, match=r"already sharded by FSDP: attach first"):
        dl.attach(model, MonaConfig(bottleneck=4))


def test_a_sharded_adapter_is_saved(one_rank, tmp_path):
    model = dl.attach(tiny_vit(), MonaConfig(bottleneck=4))
    model = sharded(randomize_adapter(model)).eval()
    x = images("vit")
    expected = model(x).detach()
    dl.save_pretrained(model, tmp_path)
    torch.testing.assert_close(dl.from_pretrained(tmp_path, tiny_vit())(x), expected)


# ------------------------------------------------------------------ scripted parts
def test_a_scripted_block_of_an_unknown_network():
    model = transformer()
    model.blocks[1] = torch.jit.trace(model.blocks[1], torch.randn(1, 16, 12))
    with pytest.raises(TypeError, match=r"ScriptModule|attach to the eager model"):
        dl.attach(model, MonaConfig(bottleneck=4))
