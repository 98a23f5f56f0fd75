"""Training of the judge on real renders, softened and shifted so that a slightly blurred image is still judged by its content."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.loop import Stage, step_generator
from trainer.models.judge import JudgeNet, to_tensor
from trainer.optimisation import Trainable
from trainer.placement import Placement
from trainer.schedule import Schedule
from trainer.worlds.base import World


def soften(image_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur (down and up again), contrast and noise, per batch element groups of a quarter."""
    parts = list(image_BCHW.chunk(4))
    size = image_BCHW.shape[-1]
    for i, share in list(enumerate((0.75, 0.5), start=1))[: len(parts) - 1]:
        small = F.interpolate(parts[i], size=int(size * share), mode="bilinear", antialias=True)
        parts[i] = F.interpolate(small, size=size, mode="bilinear")
    batch = torch.cat(parts)
    gain = 1 + 0.1 * torch.randn(len(batch), 1, 1, 1, generator=generator)
    noise = 0.05 * torch.randn(batch.shape, generator=generator)
    return (batch * gain + noise).clamp(-1, 1)


class JudgeStage(Stage):
    """Cross entropy over the world's heads."""

    def __init__(self, world: World, schedule: Schedule, batch: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.world, self.batch, self.seed, self.steps = world, batch, seed, schedule.steps
        self.net = JudgeNet(world.heads)
        Placement().place(self.net)
        self.trainables = {"judge": Trainable(self.net, schedule, weight_decay=1e-4, ema_decay=0.99, clip=5.0)}

    def _batch(self, index: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(self.seed, index)
        rng = np.random.default_rng([self.seed, index])
        images, labels = self.world.judge_images(self.batch, rng)
        image_BCHW = soften(to_tensor(images), generator).contiguous(memory_format=torch.channels_last)
        return image_BCHW, torch.from_numpy(labels)

    def step(self, index: int) -> dict[str, Tensor | float]:
        image_BCHW, labels_BH = self._batch(index)
        logits = self.net.logits(self.net.features(image_BCHW))
        losses = [F.cross_entropy(logits[h], labels_BH[:, i]) for i, h in enumerate(self.world.heads)]
        right = torch.stack([logits[h].argmax(-1) == labels_BH[:, i] for i, h in enumerate(self.world.heads)])
        loss = torch.stack(losses).sum()
        self.trainables["judge"].update(loss, index)
        return {"loss": loss, "accuracy": right.all(0).float().mean()}

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the network and its own accuracy on fresh real renders (`judge.json`)."""
        self.net.load_state_dict(self.trainables["judge"].averaged())
        images, labels = self.world.judge_images(2000, np.random.default_rng([self.seed, 10**6]))
        logits = [self.net.logits(self.net.features(part)) for part in to_tensor(images).split(250)]
        merged = {h: torch.cat([part[h] for part in logits]).argmax(-1).numpy() for h in self.world.heads}
        right = np.stack([merged[h] == labels[:, i] for i, h in enumerate(self.world.heads)]).all(0)
        self.net.save(folder / "judge")
        result = {"accuracy_on_real_renders": round(float(right.mean()), 4), "renders": len(images)}
        (folder / "judge" / "judge.json").write_text(json.dumps(result))
