"""Adapter-X (Li et al., 2024, arXiv 2406.03051): one pool of experts for all blocks, and what is each block's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from deltalens.methods.base import Method, Placement, check_choices, register, setting
from deltalens.methods.bottleneck import serial_slots
from deltalens.methods.expert_use import dead_expert_remarks
from deltalens.methods.notes import note, notes_of
from deltalens.methods.smoa import ScaleAndShift, SmallMLP, SMoA, balance
from deltalens.methods.token_pool import head_pool
from deltalens.sites.anatomy import Anatomy, Site, Tower, require
from deltalens.sites.layout import Layout, Patches, Sequence, Tokens
from deltalens.sites.norms import stream_norms

READS_PROMPTS = ("prompts", "patches+prompts", "all")


class BlockExperts(nn.Module):
    """What one block has of Adapter-X: the pool, which all blocks share, and the block's own prompt generator.

    pool: SMoA. generator: makes the prompt, None for a block without one. read: whether anybody reads that prompt.
    config: the method's; its balance loss reads what this module notes.
    """

    takes_layout = True

    def __init__(self, pool: SMoA, generator: nn.Module | None, config: AdapterXConfig, read: bool = True):
        super().__init__()
        self.pool = pool
        if generator is not None:
            self.generator = generator
        self.config = config
        self.pointwise, self.adds_tokens = generator is None or not read, generator is not None

    def experts(self, u: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Stream u -> (SMoA(u), new prompt or None)."""
        features = layout.features(u)
        y, probabilities = self.pool(features)
        if self.training and self.config.balance and probabilities is not None:
            of_balance = balance(probabilities)
            if not _class_row_only(features, layout):
                note(self.config, of_balance)
        prompt = self.generator(y) if "generator" in self._modules else None
        return layout.stream(y), prompt


class ExpertsBeside(BlockExperts):
    """`mlp.parallel`: SMoA(norm x) beside the MLP (AdaptFormer-X, DAPT-X)."""

    def forward(self, x: Tensor, normed: Tensor, layout: Layout) -> Tensor | tuple[Tensor, Tensor]:
        y, prompt = self.experts(normed, layout)
        return y if prompt is None else (y, prompt)


class ExpertsBehind(BlockExperts):
    """`mlp.inner`: u + SMoA(u) on what comes out of the MLP (Adapter-X)."""

    def forward(self, u: Tensor, layout: Layout) -> Tensor | tuple[Tensor, Tensor]:
        y, prompt = self.experts(u, layout)
        return u + y if prompt is None else (u + y, prompt)


def _class_row_only(features: Tensor, layout: Layout) -> bool:
    """Whether a block computes its prefix tokens alone, because a head reads no others."""
    return features.dim() == 3 and 0 < features.shape[1] <= layout.prefix


@register("adapter_x")
class AdapterXConfig(Method):
    """A pool of N experts with one router for all blocks; each block trains its second norm and makes a prompt.

        u   = norm_2(x)                               weight and bias trained, one for each block
        s   = split(u)                                h chunks of C/h channels of each token (B, N, C)
        p   = softmax( W s . e_i / |e_i| / tau )      W (w, C/h), e (N, w): the same in all blocks
        y   = scale * merge( p_k A_k(s) )             k = argmax p;  A_k = up_k dropout act down_k, the same in all
        x  <- x + drop_path( MLP(u) ) + y             placement="parallel": AdaptFormer-X
        P_l = gamma_l * mean over tokens act(y) + beta_l
        next block reads [class token, P_l, P_l-1, ..., P_0, patches]

    placement="serial" is Adapter-X on Houlsby's base: y = SMoA( MLP(u) ) is added to what the MLP gives. The class
    token and the head are trained, all else is frozen. The loss gets balance times the mean over the blocks of
    N sum_i f_i P_i, f_i the share of sub-tokens sent to expert i and P_i its mean probability (1 at best, N at worst),
    the term "balance" of the history. A last block that computes the class token alone, because the head reads no
    more, does not count there.

    Prompts exist where streams are sequences of tokens (ViT, points), not on maps (Swin, ConvNeXt) nor in texts. The
    last block makes one only where the head reads prompts (`pool`): else nobody would. The published counts include one
    there; the presets have it (`last_prompt`), it gets gradients of zero. On hierarchical networks each
    width has a pool of its own, and heads must divide all widths. Blocks without a norm of the stream in front of the
    MLP (ConvNeXt) take placement="serial".

    The paper says neither N, h, r, the router's width, its temperature nor the weight of the balance loss, and its
    code was not published. The values here are ours: those that meet the published counts of parameters on images and
    points alike. From its figure: placement, sharing, top-1 with the probability as gate, heads, the generator, and
    what is trained. From X-MoE's code: w = 16, embeddings normalised, tokens not, no temperature. From Switch: balance
    0.01, and the jitter of `jitter`. Presets: `vit_b()`, 170,816 parameters on ViT-B/16; `sequential()`; `point_mae()`,
    DAPT-X on Point-MAE, 415,087 with a head of 15 classes.

    Parameters: N (2 r C/h + r + C/h) + w C/h + N w, and for each block 2 C (norm) + 2 C (generator), + C.
    """

    learning_rate: ClassVar = 3e-3

    placement: str = setting(
        default="parallel", help="beside the MLP, or on its output before the residual", choices=("parallel", "serial")
    )
    experts: int = setting(default=10, help="experts N; 1 has no router")
    heads: int = setting(default=2, help="sub-tokens of a token h")
    bottleneck: int = setting(default=16, help="inner width r of an expert")
    router_width: int = setting(default=16, help="width w in which sub-tokens and experts are compared")
    shared: bool = setting(default=True, help="one pool for all blocks; False gives each block its own")
    dense: bool = setting(default=False, help="every sub-token goes to all experts, weighted by p")
    normalize_tokens: bool = setting(default=False, help="compare by the cosine, as in X-MoE's paper")
    temperature: float = setting(default=1.0, help="divides the router's scores")
    learn_temperature: bool = setting(default=False, help="learn the temperature")
    jitter: float = setting(default=0.0, help="training: the router's input times U(1 - jitter, 1 + jitter)")
    balance: float = setting(default=0.01, help="weight of the balance loss; 0 for none")
    activation: str = setting(default="relu", help="between down and up", choices=("relu", "gelu"))
    dropout: float = setting(default=0.1, help="dropout before the up-projection")
    bias: bool = setting(default=True, help="biases of the experts")
    scale: float = setting(default=1.0, help="factor on what the pool adds")
    prompts: str | None = setting(
        default="affine",
        help="prompt generators: scale and shift, a small MLP, or none",
        choices=("affine", "mlp", None),
    )
    prompt_act: str | None = setting(
        default=None, help="on the pool's result before the mean", choices=(None, "gelu", "relu")
    )
    prompt_width: int = setting(default=8, help="inner width of prompts=mlp")
    last_prompt: bool = setting(
        default=False,
        help="a generator in the last block too where no head reads its prompt: it learns nothing, but is counted",
    )
    pool: str | None = setting(
        default=None,
        help="tokens that the head reads; None: as the backbone's head does",
        choices=(None, "cls", "patches", *READS_PROMPTS),
    )
    norm: bool = setting(default=True, help="train the norm in front of the MLP")
    class_token: bool = setting(default=True, help="train the class token")

    @classmethod
    def vit_b(cls) -> AdapterXConfig:
        """AdaptFormer-X on ViT-B/16: 170,816 parameters, 0.199 %."""
        return cls(last_prompt=True)

    @classmethod
    def sequential(cls) -> AdapterXConfig:
        """Adapter-X on the sequential adapter; as many parameters."""
        return cls(placement="serial", last_prompt=True)

    @classmethod
    def point_mae(cls) -> AdapterXConfig:
        """DAPT-X on Point-MAE: experts 32 wide, GELU in experts and in front of the prompts' mean, as DAPT has it."""
        return cls(bottleneck=32, activation="gelu", prompt_act="gelu", last_prompt=True)

    def __post_init__(self):
        check_choices(self)
        for name in ("experts", "heads", "bottleneck", "router_width", "prompt_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "jitter"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.balance < 0:
            raise ValueError(f"balance must not be negative, got {self.balance}; 0 switches it off")
        if self.pool in ("prompts", "patches+prompts") and self.prompts is None:
            raise ValueError(f"pool={self.pool!r} reads prompts, and prompts=None makes none")

    def place(self, anatomy: Anatomy) -> Iterator[Placement]:
        for tower in anatomy.towers:
            pools: dict[Any, SMoA] = {}
            for block in tower.blocks:
                slot, layer = self._slot(block, anatomy)
                key = block.width if self.shared else block.index
                if key not in pools:
                    pools[key] = self._pool(block)
                read = not block.is_last or self.pool in READS_PROMPTS
                yield block, slot, layer(pools[key], self._generator(block, read), self, read)
            if self.pool is not None:
                yield self._head_pool(tower, anatomy)

    def unfreeze(self, anatomy: Anatomy) -> Iterable[str]:
        for tower in anatomy.towers:
            yield from tower.class_tensors if self.class_token else ()
            for block in tower.blocks if self.norm else ():
                yield from _norm_tensors(block, anatomy)

    def losses(self, model: nn.Module, output: Any, batch: Any) -> dict[str, Tensor]:
        found = notes_of(self)
        return {"balance": self.balance * sum(found) / len(found)} if found else {}

    def remarks(self, model: nn.Module, loader: Iterable) -> list[str]:
        return dead_expert_remarks(model, loader) if self.experts > 1 else []

    # ------------------------------------------------------------------ details
    def _slot(self, block: Site, anatomy: Anatomy) -> tuple[str, type[BlockExperts]]:
        if self.placement == "parallel":
            require(block, "mlp.parallel", "Adapter-X (or set placement to serial)", anatomy.model)
            return "mlp.parallel", ExpertsBeside
        (slot,) = serial_slots(block, ("mlp",), "Adapter-X", anatomy)
        return slot, ExpertsBehind

    def _pool(self, block: Site) -> SMoA:
        if block.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide the {block.width} channels of {block.path}; choose a divisor"
            )
        return SMoA(
            block.width,
            self.heads,
            self.experts,
            self.bottleneck,
            self.router_width,
            activation=self.activation,
            dropout=self.dropout,
            bias=self.bias,
            scale=self.scale,
            normalize_tokens=self.normalize_tokens,
            temperature=self.temperature,
            learn_temperature=self.learn_temperature,
            jitter=self.jitter,
            dense=self.dense,
        )

    def _generator(self, block: Site, read: bool) -> nn.Module | None:
        if self.prompts is None or not (read or self.last_prompt) or not takes_prompts(block):
            return None
        if self.prompts == "mlp":
            return SmallMLP(block.width, self.prompt_act, self.prompt_width)
        return ScaleAndShift(block.width, self.prompt_act)

    def _head_pool(self, tower: Tower, anatomy: Anatomy) -> Placement:
        placement = head_pool(tower, anatomy, self.pool, "Adapter-X")
        if self.pool in ("prompts", "patches+prompts") and not takes_prompts(tower.blocks[-1]):
            raise TypeError(f"pool={self.pool!r} reads prompts, which {type(anatomy.model).__name__} has no place for")
        return placement


def takes_prompts(block: Site) -> bool:
    """Whether tokens can live on behind the prefix of the block's stream: in sequences of tokens, not on maps."""
    return "tokens.in" in block.slots and (
        type(block.layout) is Sequence or isinstance(block.layout, (Tokens, Patches))
    )


def _norm_tensors(block: Site, anatomy: Anatomy) -> Iterator[str]:
    """Weight and bias of the norm in front of the MLP; nothing in blocks that show none."""
    norms = stream_norms(block.module, block.width)
    known = {path for path, _ in anatomy.backbone_parameters()}
    for leaf in ("weight", "bias") if norms else ():
        path = f"{block.path}.{norms[-1]}.{leaf}"
        if path in known:
            yield path
