"""The loop: a resumed run gives the same curve as an unbroken one; a diverged step changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.loop import DivergedError, Ema, Schedule, Stage, Trainable, load_state, run, save_state, step_generator


class Regression(Stage):
    """A linear fit to noisy data drawn from the step's own generator."""

    def __init__(self, steps: int = 12) -> None:
        torch.manual_seed(0)
        self.steps = steps
        self.trainables = {"net": Trainable(nn.Linear(3, 1), Schedule(steps, 0.05, warmup=2, cosine=True), ema_decay=0.9)}

    def step(self, index: int) -> dict[str, Tensor | float]:
        x = torch.randn(8, 3, generator=step_generator(7, index))
        trainable = self.trainables["net"]
        loss = (trainable.network(x) - x.sum(1, keepdim=True)).square().mean()
        trainable.update(loss, index)
        return {"loss": loss}

    def export(self, folder: Path) -> None:
        torch.save(self.trainables["net"].averaged(), folder / "net.pt")


def curve(stage: Regression, start: int = 0, until: int | None = None, state: Path | None = None) -> list[float]:
    losses: list[float] = []
    stage.steps = until or stage.steps
    run(
        stage,
        start=start,
        report_every=1,
        report=lambda _step, metrics: losses.append(metrics["loss"]),
        checkpoint=lambda step: save_state(stage, step, state) if state else None,
    )
    return losses


def test_the_curve_after_an_interruption_equals_the_unbroken_one(tmp_path: Path) -> None:
    unbroken = curve(Regression())
    state = tmp_path / "state.pt"
    first = curve(Regression(), until=5, state=state)
    resumed = Regression()
    assert load_state(resumed, state) == 5
    assert first + curve(resumed, start=5) == unbroken


def test_a_diverged_step_leaves_the_weights() -> None:
    stage = Regression()
    trainable = stage.trainables["net"]
    before = {name: value.clone() for name, value in trainable.network.state_dict().items()}
    with pytest.raises(DivergedError, match="step 3"):
        trainable.update(trainable.network(torch.full((1, 3), float("nan"))).mean(), 3)
    for name, value in trainable.network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_schedule_and_average_by_hand() -> None:
    schedule = Schedule(steps=10, lr=1.0, warmup=2, cosine=True, floor=0.0)
    assert [schedule.rate(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    ema = Ema(net, decay=0.999)
    nn.init.constant_(net.weight, 1.0)
    ema.update(net)  # the ramp's first decay is 2/11
    assert ema.shadow["weight"].item() == pytest.approx(1 - 2 / 11)
