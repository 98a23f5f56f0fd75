"""Several workers: the same batch, the same curve, however many there are and however they share the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.spawn import spawn

from sdxs.errors import InvalidRequest
from tests import workers
from tests.models import tiny_unet
from trainer.optimisation import DivergedError, Losses, Trainable
from trainer.placement import Deal, Placement, Turn, float32_output, frozen
from trainer.schedule import Schedule
from trainer.sections import Optimisation


@given(count=st.integers(1, 40), world=st.integers(1, 9), index=st.integers(0, 50))
def test_every_micro_batch_is_dealt_once_and_weighs_alike(count: int, world: int, index: int) -> None:
    hands = [Deal(2, count, rank, world).turns(index) for rank in range(world)]
    assert len({len(hand) for hand in hands}) == 1
    dealt = [turn for hand in hands for turn in hand if turn.weight > 0]
    assert sorted(turn.micro for turn in dealt) == list(range(count))
    assert {turn.index for hand in hands for turn in hand} == {index}
    assert sum(turn.weight for turn in dealt) / world == pytest.approx(1.0)


@given(rank=st.integers(0, 3), sequence=st.integers(0, 1000))
def test_a_worker_counts_its_micro_batches_without_a_gap(rank: int, sequence: int) -> None:
    deal = Deal(1, 10, rank, 4)
    turn = deal.turn(sequence)
    assert deal.turns(turn.index)[sequence % deal.rounds] == turn
    assert turn.sequence == sequence


def test_a_batch_that_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="workers: got 4"):
        Deal.of(Optimisation(steps=1, batch=6, lr=1.0), rank=0, world=4)
    with pytest.raises(ValueError, match="must divide batch 6"):
        Optimisation(steps=1, batch=6, micro_batch=4, lr=1.0)


def test_several_workers_train_as_one_and_either_goes_on_from_the_others_state(tmp_path: Path) -> None:
    """Three micro-batches for two workers: one of them has a turn without weight. Half the run alone, the rest by two, sharing the network
    in either way; then one step alone from what they left."""
    alone = workers.train(tmp_path / "alone", Placement(), range(4))
    for parallel in workers.PARALLEL:
        assert workers.train(tmp_path / parallel, Placement(), range(2)) == alone[:2]
    spawn(workers.both, args=(2, str(tmp_path), 2), nprocs=2)
    for parallel in workers.PARALLEL:
        folder = tmp_path / parallel
        found = json.loads((folder / "curve.json").read_text())
        for line, wanted in zip(found, alone[2:], strict=True):
            assert line == pytest.approx(wanted, rel=2e-4)
        mine, others = (torch.load(place / "averaged.pt", weights_only=True) for place in (folder, tmp_path / "alone"))
        assert mine.keys() == others.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, others[key], rtol=1e-3, atol=2e-5)
        states = [torch.load(place / "state.pt", weights_only=True) for place in (folder, tmp_path / "alone")]
        for mine, other in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
            torch.testing.assert_close(mine["exp_avg"], other["exp_avg"], rtol=1e-3, atol=2e-5)
        assert len(workers.train(folder, Placement(), range(4, 5))) == 1


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    data = torch.randn(6, 3, dtype=torch.float64)
    nets = [nn.Linear(3, 1).double(), nn.Linear(3, 1).double()]
    nets[1].load_state_dict(nets[0].state_dict())
    whole, parts = (Trainable(net, Schedule(1, 0.1), clip=1e9) for net in nets)
    whole.update(nets[0](data).square().mean(), 0)

    def losses(turn: Turn) -> Losses:
        return {"loss": nets[1](data[2 * turn.micro : 2 * turn.micro + 2]).square().mean()}

    shares = parts.learn(Deal(2, 3).turns(0), losses)
    for mine, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad)
        torch.testing.assert_close(mine, other)
    assert float(shares["loss"]) > 0


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    net = nn.Linear(2, 1)
    before = [p.detach().clone() for p in net.parameters()]
    trainable = Trainable(net, Schedule(1, 0.1))
    with pytest.raises(DivergedError, match="step 0: loss nan"):
        trainable.learn(Deal(1, 1).turns(0), lambda _turn: {"loss": net(torch.full((1, 2), float("nan"))).sum()})
    for mine, other in zip(net.parameters(), before, strict=True):
        assert torch.equal(mine, other)


def test_the_last_layer_in_float32_keeps_x0_apart_from_bfloat16_rounding() -> None:
    """x0 = (x - sigma eps) / alpha with 1 / alpha = 14.6: the error with and without it, against float32."""
    torch.manual_seed(0)
    unet = tiny_unet().eval()
    x_BCHW, text_BLD, t_B = torch.randn(4, 8, 4, 4), torch.randn(4, 5, 32), torch.full((4,), 999)
    errors = []
    with torch.no_grad():
        exact = unet(x_BCHW, t_B, text_BLD).sample
        for keep in (False, True):
            if keep:
                float32_output(unet)
            with torch.autocast("cpu", torch.bfloat16):
                output = unet(x_BCHW, t_B, text_BLD).sample
            errors.append(float((output.float() - exact).square().mean().sqrt()))
            assert (output.dtype == torch.float32) == keep
    assert 0 < errors[1] < errors[0]


def test_gradients_pass_through_a_frozen_network_and_leave_none() -> None:
    net, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with frozen(net):
        net(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_moments_of_eight_bits_learn_as_those_of_thirty_two() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    data, nets = torch.randn(64, 64), [nn.Linear(64, 64, bias=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ends = []
    for net, moments in zip(nets, ("adamw", "adamw8bit"), strict=True):
        trainable = Trainable(net, Schedule(30, 1e-2), moments=moments)  # type: ignore[arg-type]
        with torch.compiler.set_stance("force_eager"):  # to compile its step takes minutes
            for step in range(30):
                loss = net(data).square().mean()
                trainable.update(loss, step)
        ends.append(float(loss.detach()))
    assert ends[1] == pytest.approx(ends[0], rel=0.05)
