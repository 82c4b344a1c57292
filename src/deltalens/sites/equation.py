"""The equation that every block with residual branches follows, written once.

A block with branches b (attention, then mlp) reads

    n  = norm_b(x)
    u  = inner_b( body_b( pre_b(n) ) )                     the frozen branch with its LayerScale, then what sits on it
    x <- stream_b( act_b( skip_b(x) + drop_path(u) + sum of parallel_b(x, n) ) )

where skip and act are the identity in most blocks, and the block as a whole  y = block.stream( branches(x) + sum of
block.parallel(x, n_1) ), its input and output open to `tokens` modules. New tokens that parallel and inner modules
return join the stream at the end of the block. What a parallel module adds that says `in_drop_path` becomes part of u.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from deltalens.sites.attention import Keep, kept
from deltalens.sites.layout import Layout
from deltalens.sites.slots import Slots


class Branch(NamedTuple):
    """One residual branch: act(skip(x) + drop_path(body(norm(x)))). `body` includes the branch's LayerScale.

    skip: what x passes beside the branch, such as a ResScale or a strided shortcut; None for the identity. act: what
    the sum passes, as in ResNet; None for the identity.
    """

    name: str
    norm: Callable[[Tensor], Tensor]
    body: Callable[[Tensor], Tensor]
    drop_path: Callable[[Tensor], Tensor]
    skip: Callable[[Tensor], Tensor] | None = None
    act: Callable[[Tensor], Tensor] | None = None


def residual_block(
    slots: Slots, layout: Layout, x: Tensor, branches: Sequence[Branch], keep: Keep | None = None
) -> Tensor:
    """Run a pre-norm block with its slots.

    keep: compute only these tokens of the output, for a head that reads no others (see `kept`). The first branch's
    body (attention) then returns those tokens; everything after it is pointwise, which the caller has checked.
    """
    x = slots.tokens("tokens.in", x, layout)
    block_input, first_normed, new_tokens = x, None, []
    for branch in branches:
        normed = branch.norm(x)
        update = branch.body(slots.chain(f"{branch.name}.pre", normed, layout))
        update = slots.chain(f"{branch.name}.inner", update, layout, new_tokens)
        if first_normed is None:
            if keep is not None:
                x, normed, block_input = kept(x, keep), kept(normed, keep), kept(block_input, keep)
            first_normed = normed
        dropped, tokens = slots.parallel(f"{branch.name}.parallel", x, normed, layout, in_drop_path=True)
        new_tokens += tokens
        update = update if dropped is None else update + dropped
        delta, tokens = slots.parallel(f"{branch.name}.parallel", x, normed, layout)
        new_tokens += tokens
        x = (x if branch.skip is None else branch.skip(x)) + branch.drop_path(update)
        if delta is not None:
            x = x + delta
        x = x if branch.act is None else branch.act(x)
        x = slots.chain(f"{branch.name}.stream", x, layout)
    delta, tokens = slots.parallel("block.parallel", block_input, first_normed, layout)
    if delta is not None:
        x = x + delta
    x = slots.chain("block.stream", x, layout)
    for token in [*new_tokens, *tokens]:
        x = layout.insert(x, token)
    return slots.tokens("tokens.out", x, layout)


BRANCH_SLOTS = ("pre", "inner", "parallel", "stream")
RESIDUAL_BLOCK_SLOTS = frozenset(
    [f"{branch}.{slot}" for branch in ("attention", "mlp") for slot in BRANCH_SLOTS]
    + ["block.parallel", "block.stream", "tokens.in", "tokens.out"]
)
