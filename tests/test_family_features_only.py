"""Networks of windows, class attention and permuted tokens as `features_only` backbones: adapted, copied, detached."""

import copy
import pickle

import pytest
import timm
import torch
from models import randomize, randomize_adapter

import deltalens as dl

STAGES = {"embed_dim": 12, "depths": (1, 1), "num_heads": (2, 4), "img_size": 32, "patch_size": 4}
NETWORKS = {
    "swinv2_tiny_window8_256": {**STAGES, "window_size": 4},
    "swinv2_cr_tiny_ns_224": {**STAGES, "window_size": 4},
    "cait_xxs24_224": {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8},
    "xcit_nano_12_p8_224": {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32},
    "hiera_tiny_224": {"embed_dim": 8, "stages": (1, 1), "q_pool": 1, "mask_unit_size": (4, 4), "img_size": 32},
    "sam2_hiera_tiny": {"embed_dim": 8, "stages": (1, 1), "q_pool": 1, "window_spec": (4, 2), "global_att_blocks": ()},
}
ALIVE = {"xcit_nano_12_p8_224", "cait_xxs24_224", "swinv2_cr_tiny_ns_224"}  # prompts that live on, in three of them


@pytest.mark.parametrize("name", NETWORKS)
def test_features_copies_and_detach(name):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = timm.create_model(name, features_only=True, out_indices=(0, 1), **NETWORKS[name])
    model = randomize(model).eval()
    plain = [tap.clone() for tap in model(x)]
    dl.attach(model, [dl.VPTConfig(num_tokens=2, deep=name not in ALIVE), dl.MonaConfig(bottleneck=4)])
    randomize_adapter(model)
    with torch.no_grad():
        found = model(x)
        assert [tap.shape for tap in found] == [tap.shape for tap in plain]
        assert all((tap - own).abs().max() > 1e-3 for tap, own in zip(found, plain, strict=True))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(torch.equal(a, b) for a, b in zip(copied(x), found, strict=True))
        dl.detach(model)
        assert all(torch.equal(a, b) for a, b in zip(model(x), plain, strict=True))
