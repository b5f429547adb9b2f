"""A task of a user's, as `maestro-kernels train` finds it beside a configuration; see test_train.

KILL in the environment ends the process without any warning: "loss:7" before the seventh loss of
this process, "replace:3" when the third checkpoint is written but not yet in its place.
"""

import os
import random
import signal

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from maestro_kernels import files, training

calls = {"loss": 0, "replace": 0}


def kill_at(place):
    calls[place] += 1
    if os.environ.get("KILL") == f"{place}:{calls[place]}":
        os.kill(os.getpid(), signal.SIGKILL)


def make(nan_at=0, classes=4):
    """A CNN with BatchNorm and dropout: running statistics and the random state both matter."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        *(nn.Dropout(0.2), nn.Linear(6 * 16, 12), nn.ReLU(), nn.Linear(12, classes)),
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 1, 6, 6, generator=generator)
    y = torch.randint(classes, (37,), generator=generator)
    data = TensorDataset(x, y)
    seen = {"loss": 0}

    def loss(model, batch):
        kill_at("loss")
        seen["loss"] += model.training
        scores = model(batch[0])
        if nan_at and seen["loss"] >= nan_at:
            scores = scores * float("nan")
        # As augmentation does: every global generator moves the run.
        noise = 1e-3 * (random.random() + numpy.random.rand()) if model.training else 0.0
        return F.cross_entropy(scores, batch[1]) * (1 + noise)

    return training.Task(model, data, loss, test=data)


if "KILL" in os.environ:
    replace = files.os.replace

    def deadly(source, target):
        if str(target).endswith("checkpoint.pt"):
            kill_at("replace")
        replace(source, target)

    files.os.replace = deadly
