"""Two processes: this one and one spawned, for every check that needs another process.

The models travel to the other by pickle, which is also the proof that pickled models open in a fresh process.
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import METHODS, MODELS, PAIRS, assert_same, backward, images, randomize_adapter

import deltalens as dl
from deltalens.methods import AdapterXConfig, FullConfig

OTHERS = {"full": FullConfig(), "adapter_x": AdapterXConfig(experts=4, bottleneck=4, dropout=0.0)}
CASES = [pair for pair in PAIRS if pair[1] != "bitfit"] + [("vit", "bitfit"), ("resnet", "full"), ("vit", "adapter_x")]


def case(family, method):
    """(adapted model, two images) of a case. Float64: the order of sums must not matter."""
    torch.manual_seed(0)
    model = dl.attach(MODELS[family](), METHODS.get(method) or OTHERS[method])
    if family == "resnet":
        model.eval()  # batch statistics of half a batch are other numbers
    return randomize_adapter(model).double(), images(family).double()


def weighted_sum(output, rank):
    """Loss whose mean over both ranks is `models.backward`'s over the whole batch, halved."""
    weights = torch.randn(2, output.shape[1], generator=torch.Generator().manual_seed(5)).to(output)
    return (output * weights[rank : rank + 1]).sum()


def synchronised(rank, folder, cases):
    """case -> (output, gradients after synchronisation), in one of two processes that run this at the same time."""
    place, patience = f"file://{folder}/rendezvous", timedelta(minutes=15)  # importing torch on a busy machine
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=patience)
    try:
        return {name: of_case(rank, model, x) for name, (model, x) in cases.items()}
    finally:
        dist.destroy_process_group()


def of_case(rank, model, x):
    output = model(x).detach()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # unused parameters are an error in the second step
        wrapped.zero_grad()
        weighted_sum(wrapped(x[rank : rank + 1]), rank).backward()
    return output, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def other_process(_, folder, cases):
    torch.set_num_threads(1)
    torch.save(synchronised(1, folder, cases), f"{folder}/rank1.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """rank -> case -> (output, gradients after synchronisation). The models of rank 1 are unpickled ones."""
    folder = tmp_path_factory.mktemp("ddp")
    cases = {pair: case(*pair) for pair in CASES}
    other = mp.spawn(other_process, (folder, cases), nprocs=1, join=False)
    here = synchronised(0, folder, cases)
    while not other.join():  # raises what the other process raised
        pass
    return [here, torch.load(folder / "rank1.pt", weights_only=False)]


each_case = pytest.mark.parametrize(("family", "method"), CASES)


@each_case
def test_a_fresh_process_computes_the_same(two_ranks, family, method):
    model, x = case(family, method)
    output, _ = two_ranks[1][family, method]
    torch.testing.assert_close(output, model(x).detach(), atol=1e-12, rtol=1e-12)


@each_case
def test_gradients_are_those_of_the_whole_batch(two_ranks, family, method):
    model, x = case(family, method)
    _, expected = backward(model, x)
    for rank in (0, 1):
        _, grads = two_ranks[rank][family, method]
        assert not [name for name, gradient in grads.items() if gradient is None]
        found = {name: 2 * gradient for name, gradient in grads.items()}
        assert_same(found, expected, atol=1e-10, rtol=1e-8)


@each_case
def test_both_ranks_hold_the_same_gradients(two_ranks, family, method):
    first, second = (two_ranks[rank][family, method][1] for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
