"""Real images as latents, for distillation on them instead of the teacher's samples: encoded by the teacher pool, kept by content."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxs.errors import Unavailable
from sdxs.settings import Settings
from trainer.data.files import find
from trainer.data.images import FIELD, Pixels
from trainer.data.latent_cache import EncodedImages, Encoder, Progress, Rows, cached_latents
from trainer.pairs import BATCH, in_flight
from trainer.plan import source_digest
from trainer.recipe import digest
from trainer.sections import ImagesSection
from trainer.teacher import Encode, TeacherClient


def listing_digest(section: ImagesSection, settings: Settings) -> str:
    """Of the files that a section names, by name, size and time. Raises NotFound where there are none."""
    return digest(find(section.images, settings, FIELD).listing())


def encode_images(section: ImagesSection, teacher: str, client: TeacherClient, settings: Settings, progress: Progress) -> int:
    """Have the pool encode what is not kept yet; returns how many images there are."""

    def ask(image_BHWC: Pixels) -> Rows:
        pending = client.submit(Encode(image_BHWC))
        return lambda: torch.from_numpy(pending.result()[0].copy())

    encoder = Encoder(ask, in_flight(client))
    return len(cached_latents(section, encoder, source_digest(teacher), settings, BATCH, progress))


def encoded_images(section: ImagesSection, teacher: str, settings: Settings) -> EncodedImages:
    """The same on a worker, all of them kept. Raises Unavailable when one is not."""

    def missing(_: Pixels) -> Tensor:
        raise Unavailable(f"{section.images}: changed since its images were encoded")

    return cached_latents(section, missing, source_digest(teacher), settings)
