"""The judge: scores of images whose right answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.evaluation.judge import Judge
from trainer.evaluation.metrics.frechet import frechet_distance
from trainer.models.judge import FEATURES, JudgeNet, to_tensor
from trainer.stages.judge import soften
from trainer.worlds.base import World, get_world
from trainer.worlds.scenes import ScenesWorld


class Oracle(JudgeNet):
    """Answers with the labels of the nearest reference image."""

    def __init__(self, world: World) -> None:
        super().__init__(world.heads, width=4)
        captions = [*world.captions("train"), *world.captions("heldout")]
        self.images_ND = to_tensor(world.reference_images(captions)).flatten(1)
        labels = world.labels(captions)
        answers = np.concatenate([np.eye(n)[labels[:, i]] for i, n in enumerate(world.heads.values())], axis=1)
        self.answers_NF = torch.from_numpy(np.pad(answers, ((0, 0), (0, FEATURES - answers.shape[1])))).float()

    def features(self, image_BCHW: Tensor) -> Tensor:
        return self.answers_NF[torch.cdist(image_BCHW.flatten(1), self.images_ND).argmin(1)]

    def logits(self, features_BF: Tensor) -> dict[str, Tensor]:
        return dict(
            zip(self.heads, features_BF.split([*self.heads.values(), FEATURES - sum(self.heads.values())], 1), strict=False)
        )


def test_scenes_count_as_right_when_all_attributes_are() -> None:
    world = ScenesWorld()
    judge, captions = Judge(Oracle(world), world, 1.0), world.captions("heldout")
    images = world.reference_images(captions)
    right = judge.score(images, captions)
    assert (right.top1, right.top5) == (1.0, None)
    assert right.frechet == pytest.approx(0, abs=1e-5)
    colour, recoloured = {"red": "blue", "blue": "red"}, []
    for text in captions:
        words = text.split()
        words[2] = colour.get(words[2], words[2])
        recoloured.append(" ".join(words))
    untouched = sum(a == b for a, b in zip(captions, recoloured, strict=True))
    assert 0 < untouched < len(captions)
    wrong = judge.score(world.reference_images(recoloured), captions)
    assert wrong.top1 == pytest.approx(untouched / len(captions))
    assert wrong.frechet == pytest.approx(
        frechet_distance(judge.features(world.reference_images(recoloured)), judge.features(images))
    )


def test_emoji_are_ranked_among_all_of_them() -> None:
    world = get_world("emoji")
    torch.manual_seed(0)
    judge = Judge(JudgeNet(world.heads, width=4).eval(), world, 0.0)
    everything = [*world.captions("train"), *world.captions("heldout")]
    captions = world.captions("train")[::40]
    rng = np.random.default_rng(0)
    images = world.reference_images(captions).astype(int)
    noisy = (images + rng.normal(0, 60, images.shape)).clip(0, 255).astype(np.uint8)
    found = judge.score(noisy, captions)
    gallery, features = judge.features(world.reference_images(everything)), judge.features(noisy)
    ranks = []
    for feature, text in zip(features, captions, strict=True):
        cosine = [feature @ g / np.linalg.norm(feature) / np.linalg.norm(g) for g in gallery]
        ranks.append(sorted(cosine, reverse=True).index(cosine[everything.index(text)]))
    assert found.top1 == pytest.approx(np.mean([rank == 0 for rank in ranks]))
    assert found.top5 == pytest.approx(np.mean([rank < 5 for rank in ranks]))
    assert len(set(ranks)) > 5
    exact = judge.score(images.astype(np.uint8), captions)
    assert (exact.top1, exact.top5) == (1.0, 1.0)


def test_logits_are_sixteen_times_the_cosine() -> None:
    torch.manual_seed(0)
    net = JudgeNet({"a": 3, "b": 2}, width=4)
    features = torch.randn(5, FEATURES)
    found = net.logits(features)
    expected = 16 * torch.cosine_similarity(features[:, None], net.prototypes["b"][None], dim=-1)
    torch.testing.assert_close(found["b"], expected)
    assert found["a"].shape == (5, 3)


def test_a_saved_judge_judges_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = JudgeNet({"a": 3}, width=8).eval()
    net.save(tmp_path)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, after = net.features(image), JudgeNet.load(tmp_path).features(image)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=2e-3)  # float16 in the file


def test_images_become_tensors_between_minus_one_and_one() -> None:
    image = np.zeros((1, 2, 4, 3), np.uint8)
    image[0, 1, 3] = (0, 255, 51)
    assert to_tensor(image).shape == (1, 3, 2, 4)
    assert to_tensor(image)[0, :, 1, 3].tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 64])
def test_softening_keeps_the_batch_whatever_its_size(batch: int) -> None:
    image = torch.full((batch, 3, 16, 16), 0.2)
    softened = soften(image, torch.Generator().manual_seed(0))
    assert softened.shape == image.shape
    assert (softened.mean((1, 2, 3)) - 0.2).abs().max() < 0.1
