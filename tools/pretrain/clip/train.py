"""The training loop of `python -m tools.pretrain clip`: first the text tower on kept features, then both towers."""

import random
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from .. import checkpoint, log
from ..augment import Augment, for_evaluation
from ..data import ShuffledBatches, load_split
from ..schedule import Progress, learning_rate
from .captions import Captions, drawn_pictures, synonyms
from .evaluate import drawn_accuracy, photograph_accuracy
from .towers import Vocabulary, contrast, create, encode_texts, penultimate

SIZE = 48
LARGEST_SCALE = 4.6052  # ln 100, as in CLIP
ADAMW = ("token_embedding*", "*positional_embedding", "visual.class_embedding", "logit_scale")


class ClipTrainer:
    def __init__(self, args: Namespace):
        self.args = args
        if args.threads:
            torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        self.output = Path(args.output)
        self.output.mkdir(parents=True, exist_ok=True)
        data = Path(args.data)
        photographs, labels = load_split(data, "train")
        count = round(len(photographs) * args.drawn_share / (1 - args.drawn_share))
        pictures, looks = drawn_pictures(count, args.seed)
        names = synonyms(data)
        self.images = torch.cat([photographs, pictures])
        self.labels = torch.cat([labels, torch.arange(count) + len(names)])
        self.captions = Captions(names, looks)
        self.names = [each[0] for each in names]
        self.val = load_split(data, "val")
        self.held_out = drawn_pictures(args.held_out_pictures, args.seed + 1, held_out=True)

        self.vocabulary = Vocabulary(self.captions.vocabulary())
        self.clip = create(self.vocabulary)
        self.ema = ModelEmaV3(self.clip, decay=args.ema_decay, use_warmup=True)
        self.augment = Augment(args.min_area, color_jitter=args.color_jitter)
        self.batches = ShuffledBatches(len(self.images), args.batch_size, args.seed)
        self.optimizer = self.new_optimizer()
        self.step, self.text_steps, self.begun = 0, 0, 0.0  # begun: progress at the first step of both
        self.progress = Progress(args.epochs * self.batches.steps_per_epoch, args.budget_minutes)
        if args.resume and self.checkpoint_path.exists():
            self.load()

    def new_optimizer(self) -> torch.optim.Optimizer:
        return create_optimizer_v2(
            self.clip,
            opt=self.args.opt,
            lr=self.args.lr,
            weight_decay=self.args.weight_decay,
            fallback_list=ADAMW,
            fallback_no_weight_decay=True,
        )

    @property
    def checkpoint_path(self) -> Path:
        return self.output / "last.pt"

    def run(self) -> None:
        if self.text_steps == 0:
            self.train_texts()
            self.ema.set(self.clip)
            self.optimizer = self.new_optimizer()
            self.begun = self.progress.at(0)
            self.save()
        self.train_both()

    # -------------------------------------------------------------- text tower alone
    def train_texts(self) -> None:
        """As in LiT (Zhai et al., CVPR 2022): the image tower is frozen, here with one look at each picture."""
        args = self.args
        features = self.kept_features()
        for parameter in self.clip.visual.parameters():
            parameter.requires_grad = False
        self.clip.visual.proj.requires_grad = True
        self.optimizer = self.new_optimizer()
        rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
        started, losses = time.monotonic(), []
        while True:
            done = (time.monotonic() - started) / 60 / args.text_minutes
            if done >= 1:
                break
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(done, args.lr, args.warmup, args.lr / 4)
            chosen = torch.randint(len(features), (args.text_batch_size,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                images = F.normalize(features[chosen] @ self.clip.visual.proj, dim=-1)
                loss = self.loss(images, self.labels[chosen], rng)
            self.update(loss)
            losses.append(loss.item())
            self.text_steps += 1
            if self.text_steps % args.log_steps == 0:
                self.log("texts", losses, self.clip)
                losses = []
        for parameter in self.clip.parameters():
            parameter.requires_grad = True
        if losses:
            self.log("texts", losses, self.clip)

    @torch.no_grad()
    def kept_features(self) -> torch.Tensor:
        parts = []
        for batch in self.images.split(500):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
                parts.append(penultimate(self.clip.visual, for_evaluation(batch, SIZE)).float())
        return torch.cat(parts)

    # -------------------------------------------------------------- both towers
    def train_both(self) -> None:
        args, last_saved = self.args, time.monotonic()
        losses, window_start = [], time.monotonic()
        for indices in self.batches.starting_at(self.step):
            progress = self.progress.at(self.step)
            if progress >= 1:
                break
            share = (progress - self.begun) / (1 - self.begun)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(share, args.joint_lr, args.warmup, args.final_lr)
            images = self.augment(self.images[indices], SIZE)
            rng = random.Random(args.seed * 1_000_003 + self.step)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                features = F.normalize(self.clip.visual(images), dim=-1)
                loss = self.loss(features, self.labels[indices], rng)
            self.update(loss)
            self.ema.update(self.clip, step=self.step)
            losses.append(loss.item())
            self.step += 1
            if self.step % args.log_steps == 0:
                self.log("both", losses, self.ema.module, len(losses) * args.batch_size, window_start)
                losses, window_start = [], time.monotonic()
            if time.monotonic() - last_saved > args.save_minutes * 60:
                self.save()
                last_saved = time.monotonic()
        self.save()
        if losses:
            self.log("both", losses, self.ema.module, len(losses) * args.batch_size, window_start)

    def loss(self, images: torch.Tensor, labels: torch.Tensor, rng: random.Random) -> torch.Tensor:
        step = self.captions.of(labels, rng)
        texts = encode_texts(self.clip, self.vocabulary(step.texts))
        with torch.autocast("cpu", enabled=False):
            return contrast(self.clip, images.float(), texts.float(), step.positives)

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.clip.parameters(), self.args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=LARGEST_SCALE)

    # -------------------------------------------------------------- log and state
    def log(
        self, phase: str, losses: list[float], clip: torch.nn.Module, images: int = 0, since: float | None = None
    ) -> None:
        """A row for the steps since the last one. images: that they read, since that time; texts alone read none."""
        speed = "" if since is None else round(images / (time.monotonic() - since), 1)
        drawn = drawn_accuracy(clip, self.vocabulary, *self.held_out)
        row = {
            "phase": phase,
            "step": self.step if phase == "both" else self.text_steps,
            "epoch": round(self.step / self.batches.steps_per_epoch, 2),
            "minutes": round(self.progress.elapsed / 60, 2),
            "loss": round(sum(losses) / len(losses), 4),
            "val_top1": photograph_accuracy(clip, self.vocabulary, *self.val, self.names)["top1"],
            "held_out_drawn": drawn["top1"],
            "scale": round(clip.logit_scale.exp().item(), 1),
            "images_per_second": speed,
        }
        log.append(self.output / "log.csv", row)

    def save(self) -> None:
        state = {
            "args": vars(self.args),
            "token_ids": self.vocabulary.ids,
            "model": self.clip.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": checkpoint.rng_state(),
            "step": self.step,
            "text_steps": self.text_steps,
            "epochs": self.step / self.batches.steps_per_epoch,
            "elapsed": self.progress.elapsed,
            "begun": self.begun,
        }
        checkpoint.write(self.checkpoint_path, state)

    def load(self) -> None:
        state = checkpoint.read(self.checkpoint_path)
        self.clip.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        checkpoint.set_rng_state(state["rng"])
        self.step, self.text_steps, self.begun = state["step"], state["text_steps"], state["begun"]
        self.progress = Progress(self.progress.total_steps, self.args.budget_minutes, state["elapsed"])
