"""How time and memory are measured: interleaved rounds, and bytes that autograd saves for backward."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Clock = Literal["wall", "cpu"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timings:
    """Seconds of every contender in every round: name -> one number per round, all lists of one length."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> float:
        """Median over rounds of seconds[name] / seconds[reference]. Both ran within one round, so that whatever slowed
        the machine for a while slowed both."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def overhead_ratio(self, name: str, other: str, floor: str) -> float:
        """What `name` costs on top of `floor`, as a share of what `other` costs on top of it: a ratio of medians over
        rounds of (seconds / seconds[floor] - 1)."""
        return (self.ratio(name, floor) - 1) / (self.ratio(other, floor) - 1)


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    between: Callable[[], None] = lambda: None,
    device: torch.device | str = "cpu",
    clock: Clock = "wall",
    warmup: int = 1,
) -> Timings:
    """Time contenders A, B, C in the order A B C, A B C, ...

    between: called untimed after each run (to drop gradients). clock: "wall", or "cpu" for this process's processor
    time over all its threads, which other processes on the machine disturb less.
    """
    read, device = CLOCKS[clock], torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with _no_garbage_collection():
        for round_number in range(warmup + rounds):
            for name, run in contenders.items():
                _synchronize(device)
                start = read()
                run()
                _synchronize(device)
                elapsed = read() - start
                between()
                if round_number >= warmup:
                    seconds[name].append(elapsed)
    return Timings(seconds)


def saved_bytes(run: Callable[[], Tensor], existing: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of run(): each storage once and whole, however many tensors view it.

    existing: tensors that stay in memory anyway (parameters, buffers); their storages do not count. What
    checkpointing recomputes is not saved and does not count.
    """
    present = {_storage_key(tensor) for tensor in existing}
    found: dict[tuple, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = _storage_key(tensor)
        if key not in present:  # holding a tensor keeps the address from being used again
            found[key] = (tensor.untyped_storage().nbytes(), tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    total = sum(size for size, _ in found.values())
    del output
    return total


def peak_bytes(run: Callable[[], None], device: torch.device | str) -> int | None:
    """Most memory of a GPU that run() needs beyond what was allocated before it; None on a CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    _synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _storage_key(tensor: Tensor) -> tuple:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
