"""The family of point transformers: a ViT's slots on patches that lie in no grid."""

import copy
import pickle
import re

import pytest
import torch
from family_checks import adapted, assert_merges, assert_same_run, assert_untouched_by_zero, compiled_equals_eager
from matrix import NEEDS_TEXTS, PAGE, POINT_ROWS, ROWS, export, point_line, point_model, refusal, walk
from models import randomize_adapter
from torch import nn

import deltalens as dl
from deltalens.models.point_mae import PointMAE
from deltalens.models.point_transformer import PointTransformer
from deltalens.sites.layout import Patches

OPTIONS = {
    "point-mae": {},
    "point-bert": {"encoder_dim": 16, "head": "mlp"},
    "recon": {"class_tokens": ("cls", "img", "text"), "two_streams": True},
    "mini": {"head": "linear"},
    "once": {"pos_every_block": False},
}
SMALL = {"dim": 24, "depth": 2, "heads": 2, "num_groups": 5, "group_size": 4, "encoder_dim": 24}
NO_GRID = "patches of a point cloud lie in no grid"
REFUSED = {
    "Sidetune": "PointTransformer reads point clouds",
    "Convpass": NO_GRID,
    "Mona": NO_GRID,
    "Mona, design v3": NO_GRID,
    "VPT, added": "no known size; use location='add-1'",
    "VPT, patches of pixels": "needs a patch embedding",
    "VPT, image channels": "needs the first convolution",
    "VPT, frame of pixels": "needs the module that receives the pixels",
}
WALKED = (
    "Full",
    "Linear",
    "MLP-3 head",
    "Partial-1",
    "NormTuning",
    "BitFit",
    "Adapter, Houlsby",
    "AdaptFormer",
    "LoRA on q, v",
    "SSF",
    "VPT-deep",
    "VPT-shallow",
    *POINT_ROWS,
)


def make(kind: str = "mini", classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    model = PointTransformer(classes, **{**SMALL, **OPTIONS[kind]})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def clouds(batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, 24, 3, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ methods
@pytest.mark.parametrize("row", WALKED)
def test_a_method_trains_saves_loads_switches_and_detaches_bit_for_bit(row, tmp_path):
    walk(make, clouds(), row, tmp_path)


@pytest.mark.parametrize("row", REFUSED)
def test_methods_that_need_a_map_or_pixels_are_refused_with_the_reason(row):
    assert REFUSED[row] in (refusal(make, row) or "")


def test_every_method_fits_or_says_why_not_as_the_page_says():
    page = PAGE.read_text()
    refusals = {row: refusal(point_model, row) for row in ROWS | POINT_ROWS}
    assert {row for row, message in refusals.items() if message} == set(REFUSED)
    for row, message in refusals.items():
        assert point_line(row, message) in page


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("row", [row for row in ROWS | POINT_ROWS if row not in REFUSED])
def test_every_method_on_every_point_transformer(row, kind, tmp_path):
    if (row, kind) == ("Point-PEFT", "recon"):
        assert "ReCon's have two" in refusal(lambda: make(kind), row)
        return
    export(walk(lambda: make(kind), clouds(), row, tmp_path), clouds()[:2])


@pytest.mark.parametrize("config", [dl.LoRAConfig(r=2), dl.AdaptFormerConfig(bottleneck=4)])
@pytest.mark.parametrize("kind", ["point-mae", "recon"])
def test_an_adapter_that_adds_zero_changes_nothing(kind, config):
    # frozen: torch's attention takes another kernel, with another rounding, where its weights want gradients
    assert_untouched_by_zero(lambda: make(kind).requires_grad_(False), clouds(), config)


@pytest.mark.parametrize("kind", ["mini", "recon"])
@pytest.mark.parametrize("row", ["LoRA on q, v", "RepAdapter", "VPT-deep"])
def test_merged_adapters_compute_the_same(row, kind):
    model = adapted(make(kind).double(), ROWS[row]())
    assert_merges(model, clouds().double(), plain_class="VPT" not in row)


def test_recon_offers_the_layers_of_its_class_tokens():
    block = dl.describe(make("recon")).blocks()[0]
    assert {"q_contrast", "v_contrast", "proj_contrast", "fc1_contrast"} < set(block.parts)
    model = adapted(make("recon").double(), dl.LoRAConfig(r=2, parts=("q_contrast", "v_contrast", "fc2_contrast")))
    plain = make("recon").double()(clouds().double())
    assert not torch.allclose(model(clouds().double()), plain)
    assert_merges(model, clouds().double())


# ------------------------------------------------------------------ prompts
def written_out(model: PointTransformer, prompts: list[torch.Tensor], deep: bool):
    """The model with prompts as tokens behind the class tokens; deep: others in every block."""
    prefix = len(model.class_tokens)

    def run(x):
        tokens, pos = model.embed(*model.group(x))
        own = [model.get_parameter(f"{name}_token").expand(len(x), -1, -1) for name in model.class_tokens]
        their_pos = [model.get_parameter(f"{name}_pos").expand(len(x), -1, -1) for name in model.class_tokens]
        tokens, pos = torch.cat([*own, tokens], 1), torch.cat([*their_pos, pos], 1)
        carried = prompts[0].expand(len(x), -1, -1)
        for number, block in enumerate(model.blocks.blocks):
            if model.pos_every_block or not number:
                tokens = tokens + pos
            carried = prompts[number].expand(len(x), -1, -1) if deep else carried
            whole = block(torch.cat([tokens[:, :prefix], carried, tokens[:, prefix:]], 1))
            count = carried.shape[1]
            carried = whole[:, prefix : prefix + count]
            tokens = torch.cat([whole[:, :prefix], whole[:, prefix + count :]], 1)
        tokens = model.norm(tokens)
        features = torch.cat([tokens[:, :prefix].flatten(1), tokens[:, prefix:].amax(1)], 1)
        return model.cls_head_finetune(features)

    return run


@pytest.mark.parametrize("kind", ["mini", "recon", "once"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_vpt_is_the_form_with_prompts_as_tokens_without_positions(kind, deep):
    model = adapted(make(kind).double(), dl.VPTConfig(num_tokens=3, deep=deep))
    slots = [block.delta for block in model.blocks.blocks]
    modules = [m for each in slots for slot in ("attention.prompts", "tokens.in") for m in each.live(slot)]
    plain = make(kind).double()
    plain.cls_head_finetune = model.cls_head_finetune
    run = written_out(plain, [module.embedding[None] for module in modules], deep)
    assert len(modules) == (2 if deep else 1)
    assert_same_run(model, run, clouds().double())


def test_added_tokens_stand_behind_the_class_token_and_do_not_leave_the_tower():
    model = adapted(make(), dl.VPTConfig(num_tokens=3, deep=False))
    seen = []
    model.blocks.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert model.forward_features(clouds()).shape == (6, 1 + 5, 24)
    assert seen == [1 + 3 + 5]


def test_a_pool_reads_added_tokens_and_says_how_many_there_are():
    class Mean(nn.Module):
        def forward(self, tokens, layout):
            assert layout.added(tokens) == 3
            prompts = tokens[:, layout.prefix : layout.prefix + layout.added(tokens)]
            return torch.cat([tokens[:, 0], prompts.mean(1)], 1)

    class Pooled(dl.VPTConfig):
        def place(self, anatomy):
            yield from super().place(anatomy)
            yield anatomy.towers[0].classifier, "pool", Mean()

    model = make()
    before = model(clouds())
    dl.attach(model, Pooled(num_tokens=3, deep=False))
    assert model(clouds()).shape == before.shape
    assert not torch.allclose(model(clouds()), before)
    assert model.forward_features(clouds()).shape == (6, 1 + 3 + 5, 24)


def test_pools_of_one_token_do_not_fit_a_head_on_class_token_and_maximum():
    with pytest.raises(TypeError, match=r"gives features of 24 channels, and the head of PointTransformer reads 48"):
        dl.attach(make(), dl.VPTConfig(num_tokens=3, pool="cls"))


@pytest.mark.parametrize("pool", ["cls", "prompts", "all"])
def test_adapter_x_with_a_pool_of_one_token_says_so_too(pool):
    with pytest.raises(TypeError, match=r"reads 48: the class tokens and the maximum.+or take DAPT"):
        dl.attach(make(), dl.AdapterXConfig(experts=3, bottleneck=4, pool=pool))


@pytest.mark.parametrize("row", NEEDS_TEXTS)
def test_methods_of_texts_say_what_they_need(row):
    assert re.search(r"class_names|text tower", refusal(point_model, row) or "")


def test_patches_trim_what_adapters_added():
    layout = Patches(2, 4)
    x = torch.arange(9.0)[None, :, None]
    assert layout.added(x) == 3
    assert layout.trim(x).flatten().tolist() == [0, 1, 5, 6, 7, 8]
    assert layout.trim(x[:, :6]).shape == (1, 6, 1)


# ------------------------------------------------------------------ around the model
def test_features_pass_the_output_slot():
    class Doubled(nn.Module):
        def forward(self, features, inputs):
            assert inputs.shape[1:] == (24, 3)
            return 2 * features

    class Output(dl.LinearConfig):
        head_only = False

        def place(self, anatomy):
            site = anatomy.towers[0].classifier
            assert site.width_of("output") == 48
            yield site, "output", Doubled()

    model = make()
    expected = model.cls_head_finetune(2 * model.pool(model.forward_features(clouds())))
    dl.attach(model, Output())
    assert torch.equal(model(clouds()), expected)


def test_copies_and_pickles_compute_the_same():
    model = adapted(make("recon"), [dl.VPTConfig(num_tokens=2), dl.LoRAConfig(r=2)])
    expected = model(clouds())
    assert torch.equal(copy.deepcopy(model)(clouds()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(clouds()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("row", POINT_ROWS)
def test_methods_of_points_are_compiled_copied_and_pickled(row):
    model = dl.attach(make("point-mae"), POINT_ROWS[row]())
    dl.prepare(model, [clouds()])
    randomize_adapter(model)
    expected = model(clouds())
    assert torch.equal(copy.deepcopy(model)(clouds()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(clouds()), expected)
    compiled_equals_eager(model, clouds())


@pytest.mark.parametrize("kind", ["mini", pytest.param("recon", marks=pytest.mark.slow)])
def test_a_compiled_model_computes_the_same(kind):
    compiled_equals_eager(
        adapted(make(kind), [dl.VPTConfig(num_tokens=2), dl.AdaptFormerConfig(bottleneck=4)]), clouds()
    )


def test_the_encoder_of_an_autoencoder_can_be_adapted():
    torch.manual_seed(0)
    model = PointMAE(**SMALL, decoder_depth=1, decoder_heads=2).train()
    dl.attach(model, dl.AdaptFormerConfig(bottleneck=4), backbone="MAE_encoder")
    model(clouds()).backward()
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"MAE_encoder", "mask_token", "decoder_pos_embed", "MAE_decoder", "increase_dim"}
    assert all("delta" in n for n, p in model.MAE_encoder.named_parameters() if p.requires_grad)


def test_batch_norm_of_the_frozen_patches_stays_as_it_is():
    model = dl.attach(make(), dl.AdaptFormerConfig(bottleneck=4)).train()
    before = model.encoder.first_conv[1].running_mean.clone()
    model(clouds())
    assert torch.equal(model.encoder.first_conv[1].running_mean, before)


def test_models_made_by_hand_say_what_they_read():
    assert dl.preprocessing(PointTransformer(2, **SMALL, num_points=512)) == {
        "kind": "points",
        "num_points": 512,
        "normalize": "unit_sphere",
    }
