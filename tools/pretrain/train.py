"""The training loop of `python -m tools.pretrain train`."""

import time
from argparse import Namespace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from . import checkpoint, log, models
from .augment import Augment
from .data import ShuffledBatches, load_split
from .evaluate import accuracy
from .mix import mix, soft_targets
from .schedule import Progress, image_size, learning_rate


class Distiller:
    """Mean of the label loss and the cross-entropy with the predictions of a trained timm model."""

    def __init__(self, teacher: str, device: str):
        self.teacher = timm.create_model(teacher, pretrained=True).to(device).eval().requires_grad_(False)
        self.size = self.teacher.pretrained_cfg["input_size"][-1]

    def __call__(self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
            targets = self.teacher(images).float().softmax(-1)
        return (loss + F.cross_entropy(logits, targets)) / 2


class Trainer:
    def __init__(self, args: Namespace):
        self.args = args
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cpu":
            set_fused_attn(
                False
            )  # torch's fused CPU attention has a slow backward: half the images/s on short sequences
        if args.threads:
            torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        self.output = Path(args.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.native_size = models.native_size(args.model)

        self.images, self.labels = (part.to(self.device) for part in load_split(Path(args.data), "train"))
        self.val_images, self.val_labels = load_split(Path(args.data), "val")
        self.batches = ShuffledBatches(len(self.images), args.batch_size, args.seed)
        self.total_steps = args.epochs * self.batches.steps_per_epoch

        self.model = models.create(args.model, args.drop_path).to(self.device)
        self.ema = ModelEmaV3(self.model, decay=args.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(
            self.model,
            opt=args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            fallback_list=("head.*",),  # Muon leaves the classifier, embeddings and tables to AdamW
            fallback_no_weight_decay=True,
        )
        self.forward = torch.compile(self.model) if args.compile else self.model
        self.augment = Augment(args.min_area, color_jitter=args.color_jitter, erasing=args.erasing)
        self.distill = Distiller(args.teacher, self.device) if args.teacher else None
        self.step = 0
        self.progress = Progress(self.total_steps, args.budget_minutes)
        if args.resume and self.checkpoint_path.exists():
            self.load()

    @property
    def checkpoint_path(self) -> Path:
        return self.output / "last.pt"

    def run(self) -> None:
        last_saved = time.monotonic()
        losses, window_start, window_step = [], time.monotonic(), self.step
        for indices in self.batches.starting_at(self.step):
            progress = self.progress.at(self.step)
            if progress >= 1:
                break
            size = image_size(progress, [*self.args.early_sizes, self.native_size], self.args.native_from)
            losses.append(self.train_step(indices.to(self.device), progress, size))
            self.step += 1
            if self.step % self.args.log_steps == 0:
                speed = (self.step - window_step) * self.args.batch_size / (time.monotonic() - window_start)
                self.log(progress, size, torch.stack(losses).mean().item(), speed)
                losses, window_start, window_step = [], time.monotonic(), self.step
            if time.monotonic() - last_saved > self.args.save_minutes * 60:
                self.save()
                last_saved = time.monotonic()
        self.save()
        if losses:
            speed = (self.step - window_step) * self.args.batch_size / (time.monotonic() - window_start)
            self.log(1.0, self.native_size, torch.stack(losses).mean().item(), speed)

    def train_step(self, indices: torch.Tensor, progress: float, size: int) -> torch.Tensor:
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr, args.warmup, args.final_lr)
        images = self.augment(self.images[indices], size)
        targets = soft_targets(self.labels[indices], self.model.num_classes, args.smoothing)
        images, targets = mix(images, targets, args.mixup, args.cutmix)

        self.model.train()
        with torch.autocast(self.device, torch.bfloat16, enabled=args.bf16):
            logits = self.forward(images).float()
            loss = F.cross_entropy(logits, targets)
            if self.distill:
                loss = self.distill(loss, logits, images)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, step=self.step)
        return loss.detach()

    def log(self, progress: float, size: int, loss: float, images_per_second: float) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.args.bf16):
            val = accuracy(self.ema.module, self.val_images, self.val_labels, self.native_size, self.device)
        row = {
            "step": self.step,
            "epoch": round(self.step / self.batches.steps_per_epoch, 2),
            "progress": round(progress, 4),
            "minutes": round(self.progress.elapsed / 60, 2),
            "image_size": size,
            "loss": round(loss, 4),
            "ema_val_top1": val["top1"],
            "images_per_second": round(images_per_second, 1),
        }
        log.append(self.output / "log.csv", row)

    def save(self) -> None:
        state = {
            "args": vars(self.args),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": checkpoint.rng_state(),
            "step": self.step,
            "epochs": self.step / self.batches.steps_per_epoch,
            "elapsed": self.progress.elapsed,
        }
        checkpoint.write(self.checkpoint_path, state)

    def load(self) -> None:
        state = checkpoint.read(self.checkpoint_path)
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        checkpoint.set_rng_state(state["rng"])
        self.step = state["step"]
        self.progress = Progress(self.total_steps, self.args.budget_minutes, state["elapsed"])
