"""The training loop of `python -m tools.pretrain points`: Point-MAE on surface clouds of voxels."""

import time
from argparse import Namespace
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from deltalens.backbones.points import mini
from deltalens.models.point_mae import PointMAE

from .. import checkpoint, log
from ..data import ShuffledBatches
from ..schedule import Progress, learning_rate
from .augment import Augment
from .voxels import VoxelShapes


def create(args: Namespace) -> PointMAE:
    """The autoencoder around points-mini, whose class token is pretrained too."""
    return PointMAE(
        **mini.ENCODER,
        class_tokens=("cls",),
        mask_ratio=args.mask_ratio,
        decoder_depth=args.decoder_depth,
        decoder_heads=mini.ENCODER["heads"],
        drop_path=args.drop_path,
    )


class PointTrainer:
    def __init__(self, args: Namespace):
        self.args = args
        if args.threads:
            torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        self.output = Path(args.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.shapes = VoxelShapes(Path(args.data), "train")
        self.val = VoxelShapes(Path(args.data), "val")
        self.batches = ShuffledBatches(len(self.shapes), args.batch_size, args.seed)
        self.augment = Augment(scale=args.scale, shift=args.shift)
        self.model = create(args)
        self.ema = ModelEmaV3(self.model, decay=args.ema_decay, use_warmup=True)
        self.optimizer = create_optimizer_v2(self.model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
        self.step = 0
        self.progress = Progress(args.epochs * self.batches.steps_per_epoch, args.budget_minutes)
        if args.resume and self.checkpoint_path.exists():
            self.load()

    @property
    def checkpoint_path(self) -> Path:
        return self.output / "last.pt"

    def run(self) -> None:
        last_saved, losses = time.monotonic(), []
        for indices in self.batches.starting_at(self.step):
            progress = self.progress.at(self.step)
            if progress >= 1:
                break
            losses.append(self.train_step(indices, progress))
            self.step += 1
            if self.step % self.args.log_steps == 0:
                self.log(progress, torch.stack(losses).mean().item())
                losses = []
            if time.monotonic() - last_saved > self.args.save_minutes * 60:
                self.save()
                last_saved = time.monotonic()
        self.save()
        if losses:
            self.log(1.0, torch.stack(losses).mean().item())

    def train_step(self, indices: torch.Tensor, progress: float) -> torch.Tensor:
        """One step on fresh clouds of some shapes; every epoch draws others."""
        args, epoch = self.args, self.step // self.batches.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr, args.warmup, args.final_lr)
        clouds = self.augment(self.shapes.clouds(indices, mini.NUM_POINTS, args.seed * 100_003 + epoch + 1))
        self.model.train()
        loss = self.loss(self.model, clouds)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, step=self.step)
        return loss.detach()

    def loss(self, model: nn.Module, clouds: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            return 1000 * model(clouds)

    @torch.no_grad()
    def val_loss(self) -> float:
        """Of the averaged weights on one fixed cloud of every held-out shape, with fixed masks."""
        state = torch.get_rng_state()
        torch.manual_seed(0)
        model = self.ema.module.eval()
        clouds = self.val.clouds(torch.arange(len(self.val)), mini.NUM_POINTS, seed=0)
        losses = [self.loss(model, batch) * len(batch) for batch in clouds.split(64)]
        torch.set_rng_state(state)
        return float(torch.stack(losses).sum()) / len(clouds)

    def log(self, progress: float, loss: float) -> None:
        row = {
            "step": self.step,
            "epoch": round(self.step / self.batches.steps_per_epoch, 2),
            "progress": round(progress, 4),
            "minutes": round(self.progress.elapsed / 60, 2),
            "loss": round(loss, 4),
            "ema_val_loss": round(self.val_loss(), 4),
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
        self.progress = Progress(self.progress.total_steps, self.args.budget_minutes, state["elapsed"])
