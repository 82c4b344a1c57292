"""SCT and what it needs: channels chosen from data by `dl.prepare`, by the runner, or read from files."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from models import assert_same, backward, gradients, images, randomize_adapter, tiny_convnext, tiny_swin, tiny_vit
from safetensors.torch import load_file, save_file
from test_counts import SWIN, VIT_B, count
from test_training import NAMES, QUIET, Interrupted, interrupt_at, splits

import deltalens as dl
from deltalens.lifecycle.tensors import inserted_tensors
from deltalens.methods.sct import SCTLayer
from deltalens.sites.layout import ChannelsFirst, ChannelsLast, Tokens
from deltalens.tasks import ClassificationTask
from deltalens.training import TrainingSettings, fit
from deltalens.training.loaders import preparation_loader

CONFIG = dl.SCTConfig(num_channels=6, scale=0.8)
NOT_READY = r"call deltalens\.prepare\(model, loader\)"


def batches(dtype=torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """13 images of four classes with a pattern each, one of which is seen once, in batches of 4."""
    labels = torch.tensor([0, 1, 2, 1, 1, 0, 3, 1, 1, 2, 1, 1, 1])
    patterns = images("vit", batch=4, seed=8, size=(8, 8)).repeat(1, 1, 4, 4)
    pictures = (0.3 * images("vit", batch=13, seed=7) + 2 * patterns[labels]).to(dtype)
    return list(zip(pictures.split(4), labels.split(4), strict=True))


def prepared(build=tiny_vit, config=CONFIG, **kwargs):
    model = dl.attach(build(**kwargs).double(), config)
    return randomize_adapter(dl.prepare(model, batches(torch.float64)))


def channels_of(model, name="default") -> dict[str, list[int]]:
    return {n: t.tolist() for n, t in inserted_tensors(model, name).items() if n.endswith("channels")}


def chosen_by_formula(build, count: int) -> list[list[int]]:
    """Per block: the input of norm2 (the stream after attention), the L2 norm of each channel over all patch tokens of
    a class, averaged over the classes; the largest, in ascending order. On the plain model, one image at a time."""
    model, seen = build().double(), {}
    blocks = [m for m in model.modules() if hasattr(m, "norm2")]
    for i, block in enumerate(blocks):
        block.norm2.register_forward_pre_hook(lambda m, inputs, i=i: seen.setdefault(i, []).append(inputs[0][0]))
    labels = []
    with torch.no_grad():
        for pictures, batch_labels in batches(torch.float64):
            for picture, label in zip(pictures, batch_labels, strict=True):
                model(picture[None])
                labels.append(int(label))
    found = []
    for i in range(len(blocks)):
        maps = [x[1:] if build is tiny_vit else x.flatten(0, -2) for x in seen[i]]
        of_class = [torch.cat([m for m, k in zip(maps, labels, strict=True) if k == c]) for c in sorted(set(labels))]
        score = sum(tokens.norm(dim=0) for tokens in of_class) / len(of_class)
        found.append(sorted(sorted(range(len(score)), key=lambda c, score=score: -score[c])[:count]))
    return found


# ------------------------------------------------------------------ the function
@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_the_chosen_channels(build):
    expected = chosen_by_formula(build, 6)
    assert list(channels_of(prepared(build)).values()) == expected
    assert len({tuple(c) for c in expected}) > 1  # blocks differ


def test_the_formula():
    """x[S] + s (W x[S] + b) after attention, before norm2 reads it."""
    model = prepared()
    x = images("vit").double()
    output, _ = backward(model, x)
    plain = tiny_vit().double()
    plain.head.load_state_dict(model.head.state_dict())
    y = plain._pos_embed(plain.patch_embed(x))
    for block, own in zip(plain.blocks, model.blocks, strict=True):
        (layer,) = own.delta.live("attention.stream")
        y = y + block.attn(block.norm1(y))
        selection = torch.zeros(6, 24, dtype=torch.float64)
        selection[range(6), layer.channels.tolist()] = 1
        y = y + 0.8 * (y @ selection.T @ layer.adapt.weight.T + layer.adapt.bias) @ selection
        y = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(output, plain.forward_head(plain.norm(y)), atol=1e-12, rtol=1e-12)
    layer = randomize_adapter(SCTLayer(8, 3).double())
    layer.channels.copy_(torch.tensor([1, 4, 6]))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    last = layer(x, ChannelsLast())
    assert torch.equal(layer(x.permute(0, 3, 1, 2), ChannelsFirst()).permute(0, 2, 3, 1), last)
    assert torch.equal(layer(x.flatten(1, 2), Tokens(0, (3, 5))), last.flatten(1, 2))


def test_counts_and_initial_values():
    """Counted in the official code: a linear layer of 96 channels in each block."""
    assert count(VIT_B, dl.SCTConfig()).adapter == 12 * (96 * 96 + 96) == 111_744
    assert count(SWIN["b"], dl.SCTConfig(num_channels=64)).adapter == 24 * (64 * 64 + 64)
    layer = SCTLayer(768, 512)
    assert layer.adapt.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not layer.adapt.bias.any()


def test_all_gradients_flow():
    model = prepared()
    _, grads = backward(model, images("vit").double())
    assert all(grad.abs().max() > 0 for grad in grads.values())


# ------------------------------------------------------------------ preparation
def test_forward_before_preparation_says_what_to_do():
    model, x = dl.attach(tiny_vit(), CONFIG), images("vit")
    with pytest.raises(RuntimeError, match=NOT_READY):
        model(x)
    with dl.disable_adapter(model):
        model(x)
    assert dl.prepare(model, batches()) is model
    model(x)
    with pytest.raises(ValueError, match="no adapters"):
        dl.prepare(tiny_vit(), batches())


def test_preparing_leaves_everything_else_as_it_was():
    model = dl.attach(tiny_vit(proj_drop_rate=0.3), CONFIG)
    model.train()
    state = torch.get_rng_state()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = {name: m.training for name, m in model.named_modules()}
    dl.prepare(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: m.training for name, m in model.named_modules()} == modes
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {f"blocks.{i}.delta.attention_stream.adapter_default.sct.channels" for i in range(3)}
    assert all(p.grad is None for p in model.parameters())


def test_a_second_call_changes_nothing_and_reads_nothing():
    model = prepared()
    first = channels_of(model)
    dl.prepare(model, iter(()))
    other = [(pictures.flip(1) * 3, labels) for pictures, labels in batches(torch.float64)]
    dl.prepare(model, other)
    assert channels_of(model) == first


def test_each_adapter_has_its_own_channels():
    model = prepared()
    first, x = channels_of(model), images("vit").double()
    output = model(x)
    dl.attach(model, dl.SCTConfig(num_channels=3), "other")
    with pytest.raises(RuntimeError, match=NOT_READY):
        model(x)
    dl.set_adapter(model, "default")
    dl.prepare(model, batches(torch.float64))
    assert channels_of(model, "other") == {name: [-1] * 3 for name in first}
    dl.set_adapter(model, "other")
    dl.prepare(model, batches(torch.float64))
    assert list(channels_of(model, "other").values()) == chosen_by_formula(tiny_vit, 3)
    dl.set_adapter(model, "default")
    assert channels_of(model) == first
    assert torch.equal(model(x), output)


def test_without_labels_all_images_are_one_class():
    model, twin = (dl.attach(tiny_vit(), CONFIG) for _ in range(2))
    dl.prepare(model, [pictures for pictures, _ in batches()])
    dl.prepare(twin, [(pictures, torch.zeros(len(pictures), dtype=torch.long)) for pictures, _ in batches()])
    assert channels_of(model) == channels_of(twin)
    assert channels_of(model) != channels_of(prepared())  # the average over classes matters


def test_a_failing_loader_leaves_the_model_unprepared():
    def broken():
        yield batches()[0]
        raise OSError("disk")

    model = dl.attach(tiny_vit(), CONFIG).train()
    with pytest.raises(OSError, match="disk"):
        dl.prepare(model, broken())
    assert model.training
    with pytest.raises(RuntimeError, match=NOT_READY):
        model(images("vit"))
    dl.prepare(model, batches())
    assert list(channels_of(model).values()) == chosen_by_formula(tiny_vit, 6)


def test_methods_that_need_nothing_do_not_read_the_loader():
    def unread():
        raise AssertionError("read")
        yield

    dl.prepare(dl.attach(tiny_vit(), [dl.LoRAConfig(r=2), dl.MonaConfig(bottleneck=4)]), unread())


# ------------------------------------------------------------------ lifecycle
@pytest.mark.slow
def test_files_in_a_fresh_process(tmp_path):
    model = dl.attach(dl.create_backbone("deltalens/vit-mini", num_classes=4), dl.SCTConfig(num_channels=24))
    loader = [(torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 3])) for _ in range(2)]
    randomize_adapter(dl.prepare(model, loader)).eval()
    dl.save_pretrained(model, tmp_path / "a")
    assert load_file(tmp_path / "a/adapter_model.safetensors")["blocks.0.attention_stream.sct.channels"].min() >= 0
    x = torch.randn(2, 3, 48, 48)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = (
        "import sys, torch, deltalens as dl\n"
        "from safetensors.torch import load_file, save_file\n"
        "model = dl.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): save_file({'y': model(load_file(sys.argv[2])['x'])}, sys.argv[3])\n"
    )
    places = [tmp_path / "a", tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    subprocess.run([sys.executable, "-c", script, *places], check=True)
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], model(x))


def test_loaded_beside_another_adapter(tmp_path):
    model, x = prepared(), images("vit").double()
    output = model(x)
    dl.save_pretrained(model, tmp_path)
    other = dl.attach(tiny_vit().double(), dl.LoRAConfig(r=2), "first")
    dl.load_adapter(other, tmp_path, "second")  # no eval(), no prepare()
    assert torch.equal(other(x), output)


def test_copies_switching_detaching_merging():
    plain, x = tiny_swin().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, weights = plain(x), {name: t.clone() for name, t in plain.state_dict().items()}
    model = randomize_adapter(dl.prepare(dl.attach(plain, CONFIG), batches(torch.float64)))
    output = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), output)
        torch.testing.assert_close(dl.merge_and_unload(twin)(x), output, atol=1e-10, rtol=1e-10)
    dl.attach(model, dl.LoRAConfig(r=2), "b")
    dl.set_adapter(model, ["default", "b"])
    dl.set_adapter(model, "default")
    assert torch.equal(model(x), output)
    dl.detach(model)
    assert torch.equal(model(x), before)
    assert_same(model.state_dict(), weights, atol=0, rtol=0)


@pytest.mark.parametrize("build", [tiny_vit, pytest.param(tiny_swin, marks=pytest.mark.slow)])
def test_compiled_exported_bf16(build):
    model = prepared(build).float()
    x = images("vit")
    output, _ = backward(model, x)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert (low.float() - output).norm() / output.norm() < 0.05
    low.float().sum().backward()
    gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), output, atol=1e-5, rtol=1e-4)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), output, atol=1e-5, rtol=1e-4)


def test_a_compiled_model_is_prepared_uncompiled():
    torch.compiler.reset()
    model = dl.attach(tiny_vit(depth=2), CONFIG)
    model.compile(backend="aot_eager", fullgraph=True)
    dl.prepare(model, batches())
    x = images("vit")
    torch.testing.assert_close(model(x), model.forward(x), atol=1e-5, rtol=1e-4)


def test_with_checkpointing_and_prompts():
    model = prepared(config=[CONFIG, dl.VPTConfig(num_tokens=2, deep=False), dl.SSFConfig()])
    x = images("vit").double()
    output, grads = backward(model, x)
    model.set_grad_checkpointing()
    again, same = backward(model, x)
    torch.testing.assert_close(again, output, atol=1e-12, rtol=1e-12)
    assert_same(same, grads, atol=1e-10, rtol=1e-8)


# ------------------------------------------------------------------ the runner
def sct_task() -> ClassificationTask:
    model = tiny_vit(num_classes=3)
    torch.manual_seed(3)
    return ClassificationTask(dl.attach(model, dl.SCTConfig(num_channels=6)), NAMES)


def test_the_runner_prepares_once_and_before_training(tmp_path):
    expected = dl.attach(tiny_vit(num_classes=3), dl.SCTConfig(num_channels=6))
    data = splits()
    dl.prepare(expected, preparation_loader(data.train, 8, TrainingSettings(**QUIET).seed))
    task, calls = sct_task(), []
    prepare = dl.SCTConfig.prepare
    dl.SCTConfig.prepare = lambda self, model, loader: calls.append(len(loader.dataset)) or prepare(self, model, loader)
    try:
        fit(task, data, TrainingSettings(epochs=2, **QUIET), tmp_path)
    finally:
        dl.SCTConfig.prepare = prepare
    assert calls == [40]
    assert channels_of(task.model) == channels_of(expected)
    again = dl.from_pretrained(tmp_path, tiny_vit(num_classes=3))
    assert channels_of(again) == channels_of(expected)


def test_a_resumed_run_takes_its_channels_from_the_checkpoint(tmp_path, monkeypatch):
    settings = TrainingSettings(epochs=3, **QUIET)
    whole = sct_task()
    expected = fit(whole, splits(), settings, tmp_path / "whole")
    killed = sct_task()
    interrupt_at(killed, 7)
    with pytest.raises(Interrupted):
        fit(killed, splits(), settings, tmp_path / "killed")

    def refuse(self, model, loader):
        raise AssertionError("prepared again")

    monkeypatch.setattr(dl.SCTConfig, "prepare", refuse)
    resumed = sct_task()
    results = fit(resumed, splits(), settings, tmp_path / "killed", resume=True)
    assert results["val"] == expected["val"]
    first, second = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "killed"))
    assert_same(first, second, atol=0, rtol=0)
    assert min(min(c) for c in channels_of(resumed.model).values()) >= 0


def test_the_preparation_loader_is_deterministic():
    """Every item once, in order; its augmentation depends on the seed alone and leaves the random state alone."""
    data = splits().train
    state = torch.get_rng_state()
    first, second, other = (list(preparation_loader(data, 16, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    labels = torch.cat([batch[1] for batch in first])
    assert labels.tolist() == [i % 3 for i in range(40)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


# ------------------------------------------------------------------ errors
def test_errors():
    with pytest.raises(ValueError, match="num_channels must be at least 1"):
        dl.SCTConfig(num_channels=0)
    with pytest.raises(ValueError, match="num_channels=25 is more than the 24 channels"):
        dl.attach(tiny_vit(), dl.SCTConfig(num_channels=25))
    with pytest.raises(TypeError, match=r"SCT needs the slot 'attention\.stream', which ConvNeXtBlock"):
        dl.attach(tiny_convnext(), dl.SCTConfig())
