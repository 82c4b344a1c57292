"""`deltalens bench dense`: a step cut at the backbone is the step it was, and what is reported is of the backbone."""

import copy

import pytest
import torch
from torch import nn

from deltalens.studies.backbone_steps import BackboneStep, backbone_timings
from deltalens.studies.benchmarks import FULL, Options
from deltalens.studies.dense_bench import LOW, OURS, PLAIN, bench_dense


class TwoMaps(nn.Module):
    """A backbone of two maps, the second unused by the network around it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x).exp()
        return [hidden, self.second(hidden)]


class Around(nn.Module):
    def __init__(self, used):
        super().__init__()
        self.backbone, self.head, self.used = TwoMaps(), nn.Linear(4, 2), used

    def forward(self, x):
        maps = self.backbone(x)
        total = self.head(maps[0]).square().sum()
        return total + maps[1].square().sum() if self.used else total


@pytest.mark.parametrize("used", [True, False])
def test_a_cut_step_has_the_gradients_of_a_whole_one(used):
    torch.manual_seed(0)
    model, x = Around(used), torch.randn(5, 4)
    whole = copy.deepcopy(model)
    whole(x).backward()
    BackboneStep(model, "backbone", lambda: model(x), "cpu", "wall")()
    for (name, mine), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        if not used and "second" in name:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, other.grad)
    assert not model.backbone._forward_hooks
    assert not model.backbone._forward_pre_hooks


def test_seconds_and_bytes_are_the_backbones(monkeypatch):
    model, x, now = Around(True), torch.randn(5, 4), [0.0]

    def takes(module, forward, backward):
        plain = module.forward

        def slow(given):
            now[0] += forward
            output = plain(given)
            output.register_hook(lambda _: now.__setitem__(0, now[0] + backward)) if output.requires_grad else None
            return output

        module.forward = slow

    takes(model.backbone.first, 1.0, 20.0)
    takes(model.head, 300.0, 4000.0)
    step = BackboneStep(model, "backbone", lambda: model(x), "cpu", "wall")
    step.read = lambda: now[0]
    step()
    step()
    assert step.seconds == [21.0, 21.0]
    assert now[0] == 2 * 4321.0
    assert backbone_timings({"one": step}, 1).seconds == {"one": [21.0]}
    # first saves the images (5 x 4), exp its result (5 x 4), which second saves again; the head's are not counted
    assert step.saved_bytes() == 4 * (5 * 4 + 5 * 4)


@pytest.mark.parametrize("head", ["retinanet", pytest.param("upernet", marks=pytest.mark.slow)])
def test_quick_form(head):
    report = bench_dense(Options(quick=True, rounds=1, head=head, clock="cpu"))
    whole, alone = report.sections
    assert [row.name for row in whole.rows] == [row.name for row in alone.rows] == [FULL, PLAIN, OURS, LOW]
    assert report.targets == []  # stated for Swin-T and Swin-B at 512 px
    for row, part in zip(whole.rows, alone.rows, strict=True):
        assert part.seconds < row.seconds
        assert part.saved_bytes < row.saved_bytes
    outside = {row.saved_bytes - part.saved_bytes for row, part in zip(whole.rows, alone.rows, strict=True)}
    assert max(outside) - min(outside) < 0.05 * max(outside)  # one head for all
    assert alone.saved_ratio(LOW, FULL) < alone.saved_ratio(OURS, FULL) < alone.saved_ratio(PLAIN, FULL)
    assert alone.row(OURS).ratios.keys() == {"full", "plain"}
    assert alone.row(FULL).ratios == {"full": 1.0}


def test_one_image_is_too_few_for_upernet():
    with pytest.raises(ValueError, match="--batch-size 2"):
        bench_dense(Options(quick=True, batch_size=1))
