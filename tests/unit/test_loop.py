"""The loop: AdamW, clipping, schedule and average against numpy; a resumed run gives the same curve as an unbroken one."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.loop import Metrics, Stage, load_state, run, run_local, save_state, step_generator
from trainer.optimisation import DivergedError, Ema, Trainable
from trainer.schedule import Schedule

SCHEDULE = Schedule(steps=12, lr=0.05, warmup=2, cosine=True)


class KilledError(Exception):
    """Stands for the end of the process."""


class Regression(Stage):
    """A linear fit to noisy data drawn from the step's own generator; ends at `dies_at` as a killed process would."""

    def __init__(self, dies_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.steps, self.dies_at = SCHEDULE.steps, dies_at
        self.trainables = {"net": Trainable(nn.Linear(3, 1).double(), SCHEDULE, ema_decay=0.9)}

    @staticmethod
    def batch(index: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 3, generator=step_generator(7, index), dtype=torch.float64)
        return x, 0.2 * (x.sum(1, keepdim=True) - 1)

    def step(self, index: int) -> dict[str, Tensor | float]:
        if index == self.dies_at:
            raise KilledError
        (x, y), trainable = self.batch(index), self.trainables["net"]
        loss = (trainable.network(x) - y).square().mean()
        norm = trainable.update(loss, index)
        return {"loss": loss, "norm": norm}

    def export(self, folder: Path) -> None:
        torch.save(self.trainables["net"].averaged(), folder / "net.pt")


def curve(stage: Stage, start: int = 0, state: Path | None = None, checkpoint_every: int = 4) -> list[dict[str, float]]:
    """Metrics of every step, times left out; up to the kill if there is one."""
    lines: list[dict[str, float]] = []

    def report(step: int, metrics: Metrics) -> None:
        lines.append({"step": step, **{name: value for name, value in metrics.items() if name != "seconds_per_step"}})

    def checkpoint(step: int) -> None:
        if state is not None:
            save_state(stage, step, state)

    with suppress(KilledError):
        run(stage, start=start, report_every=1, checkpoint_every=checkpoint_every, report=report, checkpoint=checkpoint)
    return lines


def curve_in_numpy() -> tuple[list[float], list[float], np.ndarray, np.ndarray]:
    """Losses, gradient norms, last weights and their average: AdamW (arXiv:1711.05101) with clipping, all by hand."""
    network = Regression().trainables["net"].network
    weights = np.append(network.get_parameter("weight").detach().numpy(), network.get_parameter("bias").detach().numpy())
    average, first, second = weights.copy(), np.zeros(4), np.zeros(4)
    losses, norms = [], []
    for index in range(SCHEDULE.steps):
        x, y = (part.numpy() for part in Regression.batch(index))
        inputs = np.hstack([x, np.ones((8, 1))])
        error = inputs @ weights - y[:, 0]
        gradient = 2 * inputs.T @ error / 8
        losses.append(float((error**2).mean()))
        norms.append(float(np.linalg.norm(gradient)))
        gradient *= min(1.0, 1.0 / norms[-1])
        progress = (index - 2) / 10
        rate = 0.025 * (index + 1) if index < 2 else 0.05 * (0.02 + 0.98 * (1 + np.cos(np.pi * progress)) / 2)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        step = (first / (1 - 0.9 ** (index + 1))) / (np.sqrt(second / (1 - 0.99 ** (index + 1))) + 1e-8)
        weights = weights * (1 - 0.01 * rate) - rate * step
        decay = min(0.9, (2 + index) / (11 + index))
        average = decay * average + (1 - decay) * weights
    return losses, norms, weights, average


def test_the_curve_is_that_of_adamw_in_numpy() -> None:
    stage = Regression()
    lines = curve(stage)
    losses, norms, weights, average = curve_in_numpy()
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
    assert [line["norm"] for line in lines] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 1 > min(norms)  # some steps are clipped, some are not
    net = stage.trainables["net"]
    for state, expected in ((net.network.state_dict(), weights), (net.averaged(), average)):
        np.testing.assert_allclose(torch.cat([state["weight"][0], state["bias"]]).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("dies_at", [4, 7, 11])
def test_the_curve_after_a_kill_equals_the_unbroken_one(tmp_path: Path, dies_at: int) -> None:
    whole, state = Regression(), tmp_path / "state.pt"
    unbroken = curve(whole)
    before = curve(Regression(dies_at), state=state)
    assert len(before) == dies_at
    resumed = Regression()
    done = load_state(resumed, state)
    assert done == dies_at // 4 * 4
    assert before[:done] + curve(resumed, start=done) == unbroken  # the same floats
    for name, value in whole.trainables["net"].averaged().items():
        assert torch.equal(value, resumed.trainables["net"].averaged()[name])


def test_a_local_run_resumes_with_every_step_once_in_its_log(tmp_path: Path) -> None:
    def losses(folder: Path) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines]

    run_local(Regression(), tmp_path / "unbroken", report_every=1, checkpoint_every=4)
    with pytest.raises(KilledError):
        run_local(Regression(dies_at=7), tmp_path / "killed", report_every=1, checkpoint_every=4)
    assert [step for step, _ in losses(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6, 7]
    run_local(Regression(), tmp_path / "killed", report_every=1, checkpoint_every=4)
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    results = [torch.load(tmp_path / name / "net.pt", weights_only=True) for name in ("unbroken", "killed")]
    assert torch.equal(results[0]["weight"], results[1]["weight"])


def test_reports_are_means_since_the_last_and_the_end_is_always_saved() -> None:
    single = [line["loss"] for line in curve(Regression())]
    means: list[tuple[int, float]] = []
    saved: list[int] = []
    run(
        Regression(), report_every=5, checkpoint_every=5,
        report=lambda step, metrics: means.append((step, metrics["loss"])), checkpoint=saved.append,
    )  # fmt: skip
    assert [step for step, _ in means] == saved == [5, 10, 12]
    assert [mean for _, mean in means] == pytest.approx([np.mean(single[:5]), np.mean(single[5:10]), np.mean(single[10:])])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_step_touches_nothing(bad: float) -> None:
    stage = Regression()
    trainable = stage.trainables["net"]
    for index in range(2):
        stage.step(index)
    before = json.dumps(stage.state_dict(), default=Tensor.tolist)
    with pytest.raises(DivergedError, match="step 1"):
        trainable.update(trainable.network(torch.full((1, 3), bad, dtype=torch.float64)).mean(), 1)
    assert json.dumps(stage.state_dict(), default=Tensor.tolist) == before


def test_an_infinite_gradient_of_a_finite_loss_is_caught() -> None:
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    with pytest.raises(DivergedError, match=r"loss 0\.0, gradient norm"):
        Trainable(network, SCHEDULE).update(network(torch.ones(1, 1)).sum().sqrt(), 0)
    assert network.weight.item() == 0


def test_schedule_by_hand() -> None:
    assert [Schedule(9, 8.0, warmup=4).rate(step) for step in (0, 1, 3, 4, 8)] == [2.0, 4.0, 8.0, 8.0, 8.0]
    cosine = Schedule(steps=10, lr=1.0, warmup=2, cosine=True, floor=0.1)
    assert [cosine.rate(step) for step in (0, 1, 2, 4, 6, 10, 99)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1, 0.1]
    )


def test_a_restarted_cosine_goes_on_where_the_first_would_have_ended() -> None:
    parts = Schedule(10, 1.0, warmup=2, cosine=True), Schedule(6, 1.0, cosine=True), Schedule(4, 1.0, cosine=True)
    whole = Schedule(20, 1.0, warmup=2, cosine=True, restarts=(10, 16))
    expected = [part.rate(step) for part in parts for step in range(part.steps)]
    assert [whole.rate(step) for step in range(20)] == expected
    assert whole.rate(20) == parts[-1].rate(4)


def test_average_by_hand() -> None:
    module = nn.BatchNorm1d(1)  # has a counter, which is copied rather than averaged
    ema = Ema(module, decay=0.3)
    expected = 1.0
    for n, value in enumerate((5.0, -2.0, 3.0, 7.0), start=1):
        nn.init.constant_(module.weight, value)
        module.get_buffer("num_batches_tracked").add_(1)
        ema.update(module)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert ema.shadow["weight"].item() == pytest.approx(expected)
    assert ema.shadow["num_batches_tracked"].item() == 4


def test_noise_is_a_function_of_seed_step_and_rank() -> None:
    keys = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 5000) for rank in (0, 1, 7)]
    draws = {key: torch.rand(4, generator=step_generator(*key)) for key in keys}
    assert len({tuple(value.tolist()) for value in draws.values()}) == len(keys)
    assert torch.equal(draws[1, 5000, 7], torch.rand(4, generator=step_generator(1, 5000, 7)))
