"""Read by the type checker only (`uv run mypy`): the public API as a user writes it."""

from __future__ import annotations

import timm
import torch
from torch import nn

import deltalens as dl

model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=3)
model = dl.create_backbone("deltalens/vit-mini", num_classes=3, img_size=64)
anatomy = dl.describe(model)
widths: list[int] = [block.width for block in anatomy.blocks()]

model = dl.attach(model, dl.MonaConfig(bottleneck=64, kernels=(3, 5), memory="low"))
model = dl.attach(model, [dl.LoRAConfig(r=4, parts=("q",)), dl.BitFitConfig()], name="second", num_classes=5)
dl.attach(model, dl.VPTConfig(num_tokens=5, deep=False), "third", blocks=r"blocks\.\d+", backbone=None)
dl.attach(model, dl.make_config("linear"), "fourth")
full: dl.Method = dl.FullConfig()
linear: dl.Method = dl.LinearConfig()

dl.print_trainable_parameters(model)
count = dl.count_parameters(model)
share: float = count.percent + count.percent_with_head
total: int = count.adapter + count.head + count.trainable
for row in dl.parameter_table(model):
    shape: tuple[int, ...] = row.shape

texts: nn.Module = dl.create_backbone("open_clip/ViT-B-16/openai", class_names=["cat", "dog"], templates=["a {}."])
dl.attach(texts, [dl.MMAConfig(start=9, towers="vision"), dl.CoOpConfig(init="a photo of a")], tower="vision")
if isinstance(texts, dl.ZeroShotClassifier):
    texts.set_classes(["eel"], templates="a {}.")

dl.set_adapter(model, "second")
dl.set_adapter(model, ["default", "second"])
active: tuple[str, ...] = dl.active_adapters(model)
with dl.disable_adapter(model) as plain:
    logits: torch.Tensor = plain(torch.zeros(1, 3, 64, 64))
dl.delete_adapter(model, "second")
dl.adapter_info(model)["class_names"] = ["cat", "dog", "eel"]
names: list[str] | None = dl.class_names(model)
size = dl.preprocessing(model)["input_size"]

dl.save_pretrained(model, "folder", name="default")
again: nn.Module = dl.from_pretrained("folder")
again = dl.from_pretrained("folder", model=model)
dl.load_adapter(again, "folder", name="other")
loaded, ignored = dl.import_official(model, {"a": torch.zeros(1)}, source="mona")
merged: nn.Module = dl.merge_and_unload(model)
dl.detach(again)

methods: list[str] = dl.list_methods("v*")
models: list[str] = dl.list_models("swin*")
layer = dl.MonaLayer(dim=96, bottleneck=16, kernels=(3, 5, 7), reduce="sum", norm=None)
y: torch.Tensor = layer(torch.zeros(1, 7, 7, 96))

dl.MonaConfig(bottelneck=64)  # type: ignore[call-arg]
dl.VPTConfig(num_tokens="5")  # type: ignore[arg-type]
dl.attach(model, "mona")  # type: ignore[arg-type]
