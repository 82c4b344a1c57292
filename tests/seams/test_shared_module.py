"""Seam: one module for all blocks (SMoA) and for two towers (MMA): one object, registered once, saved once."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from clip_tiny import VECTORS, tiny_clip
from models import images, randomize_adapter, tiny_swin, tiny_vit
from safetensors.torch import load_file
from torch import nn

import deltalens as dl
from deltalens.methods import Method, register


class Pool(nn.Module):
    """One bottleneck that all blocks use."""

    pointwise = True

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x, normed):
        return self.up(torch.relu(self.down(normed)))


@register("shared_pool_for_tests")
class SharedPoolConfig(Method):
    def place(self, anatomy):
        pools = {}
        for block in anatomy.blocks():
            pool = pools.setdefault(block.width, Pool(block.width))
            yield block, "attention.parallel", pool
            yield block, "mlp.parallel", pool


def pools_of(model):
    return {id(m): m for m in model.modules() if isinstance(m, Pool)}


@pytest.mark.parametrize(("factory", "family", "count"), [(tiny_vit, "vit", 1), (tiny_swin, "swin", 2)])
def test_one_object_in_many_slots(factory, family, count):
    model, x = factory(), images(family)
    dl.attach(model, SharedPoolConfig())
    randomize_adapter(model)
    assert len(pools_of(model)) == count
    inserted = [row for row in dl.parameter_table(model) if row.kind == "inserted"]
    assert len(inserted) == 4 * count  # each tensor is listed once
    widths = {pool.down.in_features for pool in pools_of(model).values()}
    assert dl.count_parameters(model).adapter == sum(2 * 4 * width + 4 + width for width in widths)

    plain = factory()
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if "delta" not in name.split(".")})
    pools = {pool.down.in_features: pool for pool in pools_of(model).values()}
    for _, block in [(p, m) for p, m in plain.named_modules() if p.rpartition(".")[0].endswith("blocks")]:
        _explicit(block, pools[block.norm1.normalized_shape[0]])
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(pools_of(twin)) == count
        assert not pools_of(twin).keys() & pools_of(model).keys()
        assert torch.equal(twin(x), model(x))


def _explicit(block, pool):
    """Give a plain block a forward that adds the pool in parallel to attention and MLP."""

    def forward(x):
        normed = block.norm1(x)
        x = x + (block._attn(normed) if hasattr(block, "_attn") else block.attn(normed)) + pool(None, normed)
        normed = block.norm2(x)
        return x + block.mlp(normed) + pool(None, normed)

    block.forward = forward


def test_gradient_is_the_sum_over_all_places():
    model, x = tiny_vit().double(), images("vit").double()
    dl.attach(model, SharedPoolConfig())
    (pool,) = pools_of(model).values()
    model(x).sum().backward()
    found = pool.up.weight.grad.clone()

    total = torch.zeros_like(found)
    for block in model.blocks:
        for slot in ("attention_parallel", "mlp_parallel"):
            twin = copy.deepcopy(pool)
            twin.zero_grad()
            methods = block.delta._modules[slot]["adapter_default"]
            methods["shared_pool_for_tests"] = twin
            model(x).sum().backward()
            methods["shared_pool_for_tests"] = pool
            total += twin.up.weight.grad
    torch.testing.assert_close(found, total, atol=1e-11, rtol=0)


def test_file_holds_it_once_and_loading_shares_it(tmp_path):
    model, x = tiny_vit(), images("vit")
    dl.attach(model, SharedPoolConfig())
    randomize_adapter(model)
    dl.save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in tensors if ".up." in name or ".down." in name]) == 4
    fresh = tiny_vit()
    dl.load_adapter(fresh, tmp_path)
    assert len(pools_of(fresh)) == 1
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_removed_from_everywhere():
    model, x = tiny_vit(), images("vit")
    plain = model(x)
    dl.attach(model, SharedPoolConfig(), name="a")
    dl.attach(model, SharedPoolConfig(), name="b")
    assert len(pools_of(model)) == 2
    dl.delete_adapter(model, "b")
    assert len(pools_of(model)) == 1
    dl.detach(model)
    assert not pools_of(model)
    assert torch.equal(model(x), plain)


# ------------------------------------------------------------------ the published method: shared between two towers
class ModalityAdapter(nn.Module):
    """block.parallel: alpha * up(relu(shared(relu(down(norm(x))))))."""

    pointwise = True

    def __init__(self, width, rank, shared, alpha):
        super().__init__()
        self.down, self.up, self.shared = nn.Linear(width, rank), nn.Linear(rank, width), shared
        self.alpha = alpha

    def forward(self, x, normed):
        return self.alpha * self.up(torch.relu(self.shared(torch.relu(self.down(normed)))))


class MultiModalAdapter(Method):
    name = "mma"

    def __init__(self, rank, alpha, first, last):
        self.__dict__.update(rank=rank, alpha=alpha, first=first, last=last)

    def place(self, anatomy):
        image, text = sorted(anatomy.towers, key=lambda tower: tower.name)
        for index in range(self.first - 1, self.last):
            shared = nn.Linear(self.rank, self.rank)
            for tower in (image, text):
                block = tower.blocks[index]
                yield block, "block.parallel", ModalityAdapter(block.width, self.rank, shared, self.alpha)


def official_name(name: str) -> str:
    """visual.transformer.resblocks.2.delta. ... .mma.down.weight -> visual_adapter.3.down.0.weight"""
    path, _, leaf = name.partition(".delta.block_parallel.adapter_default.mma.")
    index = int(path.rpartition(".")[2]) + 1
    part, _, kind = leaf.partition(".")
    tower = "shared" if part == "shared" else "visual" if path.startswith("visual") else "text"
    return f"{tower}_adapter.{index}." + (
        f"0.{kind}" if part == "shared" else f"up.{kind}" if part == "up" else f"down.0.{kind}"
    )


@pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared/reference_vectors")
@pytest.mark.parametrize("case", ["a05", "a0001", "e3"])
def test_published_mma(case):
    vectors, inputs = (
        load_file(VECTORS / f"clip_mma_{case}.safetensors"),
        load_file(VECTORS / "clip_inputs.safetensors"),
    )
    first, last = int(vectors["start"]), int(vectors["end"])
    model = tiny_clip()
    dl.attach(model, MultiModalAdapter(int(vectors["dim"]), float(vectors["scale"]), first, last))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == (last - first + 1) * 10  # 4 image, 4 text, 2 shared tensors per block
    for name, parameter in trained.items():
        parameter.data.copy_(vectors["adapter." + official_name(name)])
    logits = model(inputs["images"], inputs["token_ids_compact"])
    torch.testing.assert_close(logits, vectors["logits"], atol=5e-5, rtol=1e-5)
    F.cross_entropy(logits, inputs["labels"]).backward()
    for name, parameter in trained.items():
        expected = vectors["grad_plain." + official_name(name)]
        torch.testing.assert_close(
            parameter.grad, expected, atol=1e-6, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )
