"""A network that learns, and Diff-Instruct's several of them: FLOPs of a step, and what is kept for its backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.models.lora import ATTENTION
from trainer.preflight.networks import Networks
from trainer.preflight.trace import Trace
from trainer.sections import DiffInstructSection

NOTHING = Trace(0, 0.0, 0.0, 0.0, 0, 0, 0)
"""Where there is no ControlNet."""


@dataclass(frozen=True)
class Learning:
    """A network that learns: which part of its parameters, with a moving average or not, moments of how many bytes a parameter, and
    whether its blocks are computed again for the backward pass."""

    trace: Trace
    learns: int
    average: bool = False
    moments: float = 8.0
    again: bool = False

    @property
    def step(self) -> float:
        """FLOPs of a forward and a backward pass."""
        return self.trace.flops + self.backward

    @property
    def backward(self) -> float:
        """FLOPs of a backward pass."""
        return self.trace.backward(self.learns == self.trace.parameters) + (self.trace.repeated if self.again else 0.0)


def through(trace: Trace) -> float:
    """FLOPs of a frozen network that gradients pass through."""
    return trace.flops + trace.backward(weights=False)


def rows(guidance: float) -> int:
    """Forwards of a guided output: with classifier-free guidance the unconditional one too."""
    return 1 if guidance == 1 else 2


def online(section: DiffInstructSection, nets: Networks, again: bool) -> Learning:
    """The online model: the offline model's shape, all of it or a LoRA, moments of 32 or 8 bits."""
    rank, trace = section.online_lora_rank, nets.offline
    learns = nets.lora(rank, "offline", ATTENTION) if rank else trace.parameters
    return Learning(trace, learns, moments=2.0 if section.online_optimizer == "adamw8bit" else 8.0, again=again)


@dataclass(frozen=True)
class Scores:
    """Diff-Instruct of one image: who generates, the online model, and a ControlNet beside it and the offline one. `several` micro-batches
    a step are generated twice: their graphs would not fit side by side."""

    section: DiffInstructSection
    nets: Networks
    mine: Learning
    theirs: Learning
    beside: Trace
    several: bool

    @property
    def matches(self) -> bool:
        return max(self.section.lambda_fm) > 0

    @property
    def frozen(self) -> int:
        """Parameters: the encoder where features are matched, the ControlNet, and under SiD an offline model in the worker with its own."""
        encoder = self.nets.encoder(self.section).parameters if self.matches else 0
        controlnets = self.beside.parameters * (2 if self.section.sid else 1)
        return encoder + controlnets + (self.nets.offline.parameters if self.section.sid else 0)

    @property
    def flops(self) -> float:
        section, ratio, encoder = self.section, self.section.online_ratio, self.nets.encoder(self.section)
        score, passing = self.nets.offline.flops + self.beside.flops, through(self.nets.offline) + through(self.beside)
        generated = self.mine.step + self.mine.trace.flops * (ratio - 1 + (1 if self.several else 0))
        learnt = ratio * (self.theirs.step + self.beside.flops) * (2 if section.latent_gan else 1)
        estimate = passing * (1 + rows(section.guidance)) if section.sid else score
        realism = passing if section.latent_gan else 0
        matching = through(encoder) + encoder.flops if self.matches else 0
        return generated + learnt + estimate + realism + matching

    def kept(self, images: int, checkpointing: bool) -> int:
        """At the fuller of two moments: the online model's update beside the student's waiting graph, or the student's own."""
        section, offline = self.section, self.nets.offline
        student, encoder = self.mine.trace.saved(images, checkpointing), self.nets.encoder(section).saved(images, False)
        passes = (1 if section.latent_gan else 0) + (1 + rows(section.guidance) if section.sid else 0)
        learning = offline.saved(images * (2 if section.latent_gan else 1), checkpointing) + (0 if self.several else student)
        score = offline.saved(images, checkpointing) + self.beside.saved(images, checkpointing)
        moving = student + (encoder if self.matches else 0) + passes * score
        return max(learning, moving)
