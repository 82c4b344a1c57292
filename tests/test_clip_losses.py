"""Words with further loss terms, or a rule for gradients: published values, and loops written by hand."""

import pytest
import torch
import torch.nn.functional as F
from clip_checks import MODELS, assert_gradients, fill, needs, trained, vit_b16
from clip_models import NAMES, vectors, zero_shot

import deltalens as dl
from deltalens.methods import CoOpConfig, KgCoOpConfig, LASPConfig, MMAConfig, ProGradConfig
from deltalens.tasks import ClassificationTask, backward


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ KgCoOp
LABELS = torch.tensor([0, 3, 1])
PET = "a photo of a {}, a type of pet."


def runs_of_texts(model):
    """A list that grows with every run of the text tower's first block."""
    seen, tower = [], next(tower for tower in dl.describe(model).towers if tower.name == "text")
    tower.blocks[0].module.register_forward_hook(lambda _, args, y: seen.append(len(args[0])))
    return seen


def test_kgcoop_is_cross_entropy_and_a_distance(images):
    """Loss and gradient against CoOp and texts of a plain model; texts are run once in a step, templates once."""
    model = dl.attach(zero_shot(templates=PET), KgCoOpConfig(weight=3.0))
    plain = dl.attach(zero_shot(), CoOpConfig(init="a photo of a"))
    fill(trained(model).values(), [p + 0.1 * torch.randn_like(p) for p in trained(model).values()])
    fill(trained(plain).values(), trained(model).values())
    task = ClassificationTask(model, NAMES).train()
    result = task((images, LABELS))
    logits = plain.train()(images)
    with torch.no_grad():
        templates = zero_shot(templates=PET).text_features()
    distance = 1 - F.cosine_similarity(plain.text_features(), templates).mean()
    expected = F.cross_entropy(logits, LABELS) + 3.0 * distance
    assert result["losses"].keys() == {"cross_entropy", "kgcoop.distance"}
    assert distance > 1e-3
    torch.testing.assert_close(result["loss"], expected, atol=1e-5, rtol=1e-5)
    result["loss"].backward()
    expected.backward()
    for one, other in zip(trained(model).values(), trained(plain).values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
    seen = runs_of_texts(model)
    for _ in range(2):
        task((images, LABELS))["loss"].backward()
    assert seen == [5, 5]
    assert task.eval()((images, LABELS))["losses"].keys() == {"cross_entropy"}


def test_templates_are_those_of_the_frozen_model_and_follow_classes_and_weights(images):
    model = dl.attach(zero_shot(templates=PET), [KgCoOpConfig(), MMAConfig(start=2, bottleneck=4, alpha=0.5)])
    expected = zero_shot(templates=PET).text_features().detach()
    model(images)
    torch.testing.assert_close(model.frozen_texts()[:, 0], expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(model.text_features(), zero_shot().text_features(), atol=1e-3)  # adapters are back
    model.set_classes(NAMES[:2])
    torch.testing.assert_close(model.frozen_texts()[:, 0], expected[:2], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        model.clip.ln_final.weight.mul_(torch.linspace(0.5, 2, 64))
    assert not torch.allclose(model.frozen_texts()[:, 0], expected[:2], atol=1e-3)


def test_kgcoop_is_refused_where_the_text_tower_trains(images):
    model = dl.attach(zero_shot(), [KgCoOpConfig(), dl.BitFitConfig()])
    with pytest.raises(TypeError, match="weights of that tower are trained"):
        ClassificationTask(model, NAMES).train()((images, LABELS))
    assert dl.count_parameters(dl.attach(vit_b16(), KgCoOpConfig())).adapter == 2_048


# ------------------------------------------------------------------ ProGrad
def prograd_task(**options):
    """A task whose cross-entropy goes against the zero-shot model: its labels are what that model says least."""
    torch.manual_seed(0)
    model = zero_shot(templates=PET)
    dl.attach(model, [ProGradConfig(num_words=4, **options)])
    return ClassificationTask(model, NAMES).train()


def unlikely(images):
    with torch.no_grad():
        return zero_shot(templates=PET)(images).argmin(-1)


def rule_by_hand(task, images, labels, strength):
    """(gradient, whether the terms oppose one another) of the one trained tensor, by plain autograd."""
    (ctx,) = trained(task).values()
    logits = task.model(images)
    with torch.no_grad():
        teacher = zero_shot(templates=PET)(images).softmax(-1)
    (g_ce,) = torch.autograd.grad(F.cross_entropy(logits, labels), ctx, retain_graph=True)
    soft = -(teacher * logits.log_softmax(-1)).sum(-1).mean()  # KL but for a constant
    (g_kl,) = torch.autograd.grad(soft, ctx)
    unit = g_kl / g_kl.norm()
    along = torch.dot(g_ce.flatten(), unit.flatten())
    return (g_ce - strength * along * unit, True) if along < 0 else (g_ce, False)


@pytest.mark.parametrize(("opposed", "scale"), [(True, 1.0), (False, 1.0), (True, 1024.0)])
def test_prograd_steps_are_those_of_a_loop_by_hand(opposed, scale, images):
    task = prograd_task(strength=0.8)
    likely = zero_shot(templates=PET)(images).argmax(-1)
    labels = unlikely(images) if opposed else likely
    optimizer = torch.optim.SGD(trained(task).values(), lr=0.01)
    for _ in range(2):
        expected, against = rule_by_hand(task, images, labels, 0.8)
        assert against == opposed
        result = task((images, labels))
        assert result["losses"].keys() == {"cross_entropy", "prograd.zero_shot"}
        optimizer.zero_grad()
        backward(task, result, scale * result["loss"])
        (ctx,) = trained(task).values()
        torch.testing.assert_close(ctx.grad / scale, expected, atol=1e-6, rtol=1e-4)
        ctx.grad /= scale
        optimizer.step()


def test_the_zero_shot_term_is_a_divergence(images):
    """0 where both say the same, and the frozen model's image features where an adapter changes them."""
    model = dl.attach(zero_shot(), ProGradConfig(init="a photo of a"))
    assert ClassificationTask(model, NAMES).train()((images, LABELS))["losses"]["prograd.zero_shot"].abs() < 1e-5
    model = dl.attach(zero_shot(), [ProGradConfig(num_words=4), MMAConfig(start=1, bottleneck=4, alpha=0.5)])
    with torch.no_grad():
        expected = zero_shot()(images)
    model.train()(images)
    torch.testing.assert_close(model.zero_shot_logits(images), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(images), expected, atol=1e-2)


def test_gradient_rules_alone_cost_a_second_backward(images):
    """Without a rule `backward` is loss.backward(); what cannot be right is refused."""
    model = dl.attach(zero_shot(), KgCoOpConfig())
    task = ClassificationTask(model, NAMES).train()
    backward(task, task((images, LABELS)))
    (one,) = [p.grad.clone() for p in trained(model).values()]
    model.zero_grad()
    task((images, LABELS))["loss"].backward()
    (other,) = [p.grad for p in trained(model).values()]
    assert torch.equal(one, other)
    task = prograd_task()
    backward(task, task((images, LABELS)))
    with pytest.raises(ValueError, match="do not accumulate"):
        backward(task, task((images, LABELS)))
    dl.attach(task.model, ProGradConfig(num_words=4), name="second")
    dl.set_adapter(task.model, ["default", "second"])
    with pytest.raises(ValueError, match="each have a gradient rule"):
        backward(task, task((images, LABELS)))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_overflows_stays_visible(bad):
    """A step that loss scaling has to skip is not made finite by the rule."""
    fine, broken = torch.ones(3), torch.tensor([bad, 1.0, 1.0])
    for ce, kl in ((fine, broken), (broken, fine)):
        (found,) = ProGradConfig().combine({"cross_entropy": [ce], "prograd.zero_shot": [kl]})
        assert not found.isfinite().all()
    (found,) = ProGradConfig().combine({"cross_entropy": [fine], "prograd.zero_shot": [torch.zeros(3)]})
    assert torch.equal(found, fine)


@pytest.mark.parametrize("scaled", [False, True])
def test_lightning_follows_the_rule(scaled, images):
    """One SGD step of the trainer, with a GradScaler too, is that of the loop by hand; accumulation is refused."""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision
    from toy_training import QUIET

    from deltalens.data import ArrayDataset, Splits
    from deltalens.training import TrainingSettings
    from deltalens.training.module import TaskModule

    task, labels = prograd_task(), unlikely(images)
    pixels = (images.permute(0, 2, 3, 1) * 20 + 128).clamp(0, 255).to(torch.uint8).numpy()
    data = ArrayDataset(pixels, labels.numpy(), lambda image: (image.float() - 128) / 20)
    inputs = torch.stack([data[i][0] for i in range(3)])
    (ctx,) = trained(task).values()
    before = ctx.detach().clone()
    expected, against = rule_by_hand(task, inputs, labels, 1.0)
    assert against
    settings = TrainingSettings(epochs=1, optimizer="sgd", **(QUIET | {"batch_size": 3}))
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "limit_val_batches": 0,
               "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
               "use_distributed_sampler": False}  # fmt: skip
    splits = Splits(data, data, list(NAMES), data)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
    pl.Trainer(**options, plugins=plugins).fit(TaskModule(task, splits, settings))
    moved = (before - ctx.detach()) / settings.lr
    tolerance = 3e-2 if scaled else 1e-4
    assert (moved - expected).norm() < tolerance * expected.norm()
    with pytest.raises(ValueError, match="do not accumulate"):
        pl.Trainer(**options, accumulate_grad_batches=2).fit(TaskModule(prograd_task(), splits, settings))


# ------------------------------------------------------------------ LASP
LASP_TEMPLATES = ("a photo of a {}, a type of pet.", "{} texture.", "itap of a {}.")


def lasp_parameters(model):
    """Parameters by the official names, whichever library the image tower is from."""
    found = {
        "prompt_learner.ctx": model.live("text.context")[0].ctx,
        "prompt_learner.w": model.live("text.output")[0].w,
    }
    for name, parameter in trained(model).items():
        if "delta" not in name.split("."):
            path, _, kind = name.rpartition(".")
            block, _, norm = path.rpartition(".")
            leaf = f"{block.rpartition('.')[2]}.ln_{norm[-1]}.{kind}"
            found[f"image_encoder.transformer.resblocks.{leaf}"] = parameter
    return found


@needs("clip_lasp")
@pytest.mark.parametrize("make", MODELS)
def test_published_lasp(make):
    given, inputs = vectors("clip_lasp"), vectors("clip_inputs")
    model = zero_shot(clip=MODELS[make](), names=NAMES[:3])
    dl.attach(model, LASPConfig(templates=LASP_TEMPLATES, noise=0.0, virtual_classes=NAMES[3:]))
    parameters = lasp_parameters(model)
    assert {f"grad.{name}" for name in parameters} == {name for name in given if name.startswith("grad.")}
    fill(list(parameters.values())[:2], [given["param.ctx"], given["param.w"]])
    result = ClassificationTask(model, NAMES[:3]).train()((inputs["images"][given["image_index"]], given["labels"]))
    torch.testing.assert_close(result["output"], given["logits"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(result["losses"]["lasp.texts"], 5 * given["loss_t2t"].squeeze(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(result["loss"], given["loss_total"].squeeze(), atol=1e-4, rtol=1e-5)
    result["loss"].backward()
    assert_gradients(parameters, given)


def test_lasp_without_virtual_classes(images):
    """No other name enters training, and names that are classes by now count once."""
    losses = []
    for names, virtual in ((NAMES[:3], ()), (NAMES[:3], NAMES[:3]), (NAMES[:3], NAMES), (NAMES, NAMES), (NAMES, ())):
        config = LASPConfig(templates=LASP_TEMPLATES, noise=0.0, virtual_classes=virtual)
        task = ClassificationTask(dl.attach(zero_shot(names=names), config), names).train()
        losses.append(task((images, LABELS.clamp(max=2)))["losses"]["lasp.texts"])
    torch.testing.assert_close(losses[0], losses[1])
    assert (losses[2] - losses[0]).abs() > 1e-2
    torch.testing.assert_close(torch.stack(losses[2:]), losses[2].expand(3), atol=1e-4, rtol=1e-5)


def test_noise_of_lasp_comes_in_its_share_of_steps(images):
    config = LASPConfig(templates=LASP_TEMPLATES, noise_probability=0.3)
    task = ClassificationTask(dl.attach(zero_shot(), config), NAMES).train()
    silent = ClassificationTask(dl.attach(zero_shot(), LASPConfig(templates=LASP_TEMPLATES, noise=0.0)), NAMES).train()
    method = "lasp.texts"
    quiet = silent((images, LABELS))["losses"][method]
    torch.manual_seed(0)
    noisy = [(task((images, LABELS))["losses"][method] - quiet).abs() > 1e-3 for _ in range(12)]
    torch.manual_seed(0)
    expected = []
    for _ in range(12):
        expected.append(torch.rand(()).item() < 0.3)
        if expected[-1]:
            torch.randn(5, 3, 32)
    assert [bool(each) for each in noisy] == expected
    assert 0 < sum(expected) < 12


@pytest.mark.parametrize("make", MODELS)
def test_norms_of_the_image_tower_train_at_a_tenth_of_the_rate(make):
    from deltalens.training.optim import parameter_groups

    model = dl.attach(zero_shot(clip=MODELS[make]()), LASPConfig())
    task = ClassificationTask(model, NAMES)
    rates = {name: group["lr"] for group in parameter_groups(task, 1.0, 0.0) for name in group["names"]}
    norms = {name: rate for name, rate in rates.items() if "delta" not in name.split(".")}
    assert len(norms) == 4 * 4
    assert set(norms.values()) == {0.1}
    assert all("vis" in name for name in norms)
    assert {rate for name, rate in rates.items() if name not in norms} == {1.0}
    dl.attach(model, LASPConfig(norms=False, correction=False), name="words")
    assert len(parameter_groups(task, 1.0, 0.0)[0]["names"]) == 1


def test_lasp_counts_and_files(images, tmp_path):
    counts = dl.count_parameters(dl.attach(vit_b16(), LASPConfig()))
    assert counts.adapter == 39_424
    model = dl.attach(zero_shot(), LASPConfig(virtual_classes=("a dog",))).eval()
    fill(trained(model).values(), [p + 0.1 * torch.randn_like(p) for p in trained(model).values()])
    with torch.no_grad():
        logits = model(images)
        dl.save_pretrained(model, tmp_path)
        assert torch.equal(dl.from_pretrained(tmp_path, zero_shot())(images), logits)
        assert not torch.allclose(logits, zero_shot()(images), atol=1e-2)
