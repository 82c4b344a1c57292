"""Small networks that no family knows, and a method whose modules keep the maps that they are given."""

import torch
from models import CLASSES
from torch import nn

import deltalens as dl
from deltalens.methods import Method

WIDTH = 6


class Residual(nn.Module):
    """A block on any stream with channels last: x + mlp(x)."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, *others):
        return x + self.fc2(self.fc1(x).relu())


class ConvBlock(nn.Module):
    def __init__(self, width=WIDTH, out=None, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out or width, 3, stride, 1)
        self.conv2 = nn.Conv2d(out or width, out or width, 3, 1, 1)

    def forward(self, x):
        y = self.conv2(self.conv1(x).relu())
        return x + y if x.shape == y.shape else y


class Layer(nn.Module):
    """A convolution with norm and activation, as stems are made of."""

    def __init__(self, inside, out, stride=1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inside, out, 3, stride, 1), nn.BatchNorm2d(out)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Network(nn.Module):
    """Patches, then `arrange`, then blocks, then the mean as features."""

    pretrained_cfg = {"input_size": (3, 32, 48)}

    def __init__(self, arrange, blocks=3):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.extra = nn.Parameter(torch.randn(1, 24, WIDTH))
        self.blocks = nn.Sequential(*[Residual() for _ in range(blocks)])
        self.head, self.arrange = nn.Linear(WIDTH, CLASSES), arrange

    def forward(self, x):
        x = self.blocks(self.arrange(self, self.patches(x)))
        return self.head(x.flatten(1, -2).mean(1))


def towers(model, blocks=None):
    return dl.describe(model, blocks=blocks).towers


def paths(model):
    return [block.path for block in dl.describe(model).blocks()]


def rows(x):
    return x.flatten(2).transpose(1, 2)


class Taker(nn.Module):
    """A spatial module that keeps the map it gets."""

    spatial = True

    def forward(self, x):
        self.seen = x
        return x


class TakeMaps(Method):
    name = "takemaps"

    def __init__(self):
        self.__dict__["takers"] = []

    def place(self, anatomy):
        for block in anatomy.blocks():
            self.takers.append(Taker())
            yield block, "block.stream", self.takers[-1]
