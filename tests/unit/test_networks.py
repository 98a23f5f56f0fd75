"""The usual networks: CLIP against its own outputs, Inception against torch-fidelity's arithmetic; what is said when one is not there."""

from __future__ import annotations

import shutil
import sys
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxs.errors import InvalidRequest, NotFound, PreconditionFailed
from tests.networks import CLIP_SIZE, tiny_clip
from trainer.evaluation.metrics import inception
from trainer.evaluation.metrics.clip import ClipFeatures
from trainer.evaluation.metrics.inception import InceptionFeatures
from trainer.evaluation.metrics.networks import Networks

WORDS = ["red circle", "a blue square that is far too long to be read", "x"]


def images(count: int = 3, size: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipFeatures:
    return ClipFeatures(str(tiny_clip(tmp_path_factory.mktemp("clip"), seed=3)))


def test_the_clip_score_by_hand(clip: ClipFeatures) -> None:
    """The similarities CLIPModel itself answers with, of pixels prepared here: bicubic, then CLIP's mean and deviation."""
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    small = [np.asarray(Image.fromarray(i).resize((CLIP_SIZE, CLIP_SIZE), Image.Resampling.BICUBIC)) for i in images()]
    pixels = torch.from_numpy((np.stack(small) / 255 - mean) / deviation).permute(0, 3, 1, 2).float()
    tokens = [clip.tokenizer(text, truncation=True, max_length=16)["input_ids"] for text in WORDS]
    cosines = []
    with torch.no_grad():
        for row, ids in zip(pixels, tokens, strict=True):
            answer = clip.network(pixel_values=row[None], input_ids=torch.tensor([ids]))
            cosines.append(float(answer.logits_per_image / clip.network.logit_scale.exp()))
    assert min(cosines) < 0 < max(cosines)  # both arms of the maximum
    assert clip.score(images(), WORDS) == pytest.approx(np.mean([max(100 * c, 0) for c in cosines]), abs=1e-3)


class ForTorchmetrics:
    """A CLIP model whose features are tensors, as torchmetrics expects of an older transformers; and its processor."""

    def __init__(self, clip: ClipFeatures) -> None:
        self.clip, self.config = clip, clip.network.config

    def to(self, _: object) -> ForTorchmetrics:
        return self

    def get_image_features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return self._tensor(self.clip.network.get_image_features(pixel_values=pixels_BCHW))

    def get_text_features(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return self._tensor(self.clip.network.get_text_features(input_ids=ids_BL, attention_mask=mask_BL))

    @staticmethod
    def _tensor(answer: Any) -> torch.Tensor:
        found: torch.Tensor = getattr(answer, "pooler_output", answer)
        return found

    def processor(self, images: Any = None, text: Any = None, **_: object) -> Any:
        if text is not None:
            return self.clip.tokenizer(text, padding=True, return_tensors="pt")
        return self.clip.processor(images, input_data_format="channels_first", return_tensors="pt")


def test_torchmetrics_gives_each_image_the_same_clip_score_and_differs_where_the_docs_say(clip: ClipFeatures) -> None:
    """Its mean is clipped, ours each image; and it cuts the end off a caption that is too long, which CLIP reads as another one."""
    multimodal = pytest.importorskip("torchmetrics.multimodal.clip_score")
    wrapped = ForTorchmetrics(clip)
    with torch.no_grad():
        metric = multimodal.CLIPScore(model_name_or_path=lambda: (wrapped, wrapped.processor))
        texts, pictures = ["red circle", "blue square", "x", "a line", "b", "hat"], images(6)
        tensors = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        theirs = [float(metric(image, text)) for image, text in zip(tensors, texts, strict=True)]
        ours = [clip.score(image[None], [text]) for image, text in zip(pictures, texts, strict=True)]
        assert theirs == pytest.approx(ours, abs=1e-3)
        assert min(ours) == 0 < max(ours)
        assert clip.score(pictures, texts) == pytest.approx(np.mean(theirs), abs=1e-3)
        assert 0 <= float(metric.compute()) < np.mean(theirs) - 0.1
        long = WORDS[1:2]
        with pytest.warns(UserWarning, match="Will truncate"):
            cut, _ = multimodal._clip_score_update(tensors[:1], long, wrapped, wrapped.processor)
        raw = 100 * (clip.features(pictures[:1]) * clip._read(long).double().numpy()).sum()
        assert abs(float(cut) - raw) > 0.1


def test_clip_features_are_unit_vectors_whatever_the_batch(clip: ClipFeatures) -> None:
    many = np.concatenate([images(40), images(3)])
    features = clip.features(many)
    assert features.shape == (43, 16) and features.dtype == np.float64
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(43), abs=1e-6)
    assert features[40:] == pytest.approx(features[:3], abs=1e-6)


def test_a_clip_that_is_not_there_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(
        NotFound, match=r"clip 'openai/absent'.*a local folder or a hub id such as openai/clip-vit-base-patch16$"
    ):
        ClipFeatures("openai/absent")
    with pytest.raises(NotFound, match="not/a/hub/id"):
        ClipFeatures("not/a/hub/id")
    with pytest.raises(InvalidRequest, match=r"^clip: .*a CLIP model in transformers format"):
        ClipFeatures(str(tmp_path))


@pytest.mark.parametrize("older", [False, True])
def test_a_clip_of_the_hub_is_downloaded_in_one_format(
    clip: ClipFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    """OpenAI's base models have no safetensors there; LAION's have the same weights twice more, for another library."""
    hub, cache = tiny_clip(tmp_path / "hub", seed=3), tmp_path / "cache"
    torch.save(load_file(hub / "model.safetensors"), hub / "pytorch_model.bin")
    (hub / "open_clip_pytorch_model.safetensors").write_bytes(b"for another library")
    if older:
        (hub / "model.safetensors").unlink()

    def download(_: str, allow_patterns: list[str]) -> str:
        for name in [path.name for path in hub.iterdir() if any(fnmatch(path.name, pattern) for pattern in allow_patterns)]:
            (cache / name).parent.mkdir(exist_ok=True)
            shutil.copy(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert np.array_equal(ClipFeatures("owner/clip").features(images()), clip.features(images()))
    weights = {path.name for path in cache.iterdir() if path.suffix in (".bin", ".safetensors")}
    assert weights == {"pytorch_model.bin" if older else "model.safetensors"}


def test_inception_weights_that_are_not_there_say_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"inception: there is no file 'absent.pth'.*downloaded from https://.*-6726825d.pth$"):
        Networks.open("absent.pth", None)
    assert Networks.open(None, None).all() == []


def test_inception_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "_PACKAGE", "torch_fidelity_that_is_not_installed")
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(PreconditionFailed, match=r"pip install --no-deps 'torch-fidelity"):
        InceptionFeatures(tmp_path / "weights.pth")


needs_torch_fidelity = pytest.mark.skipif(
    find_spec("torch_fidelity") is None, reason="torch-fidelity (extra eval) is not installed"
)


@needs_torch_fidelity
@pytest.mark.parametrize("content", [{"other": torch.zeros(1)}, b"not weights"])
def test_other_weights_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InvalidRequest, match=r"^inception: .*weights.pth.*-6726825d.pth"):
        InceptionFeatures(path)


@needs_torch_fidelity
def test_inception_is_torch_fidelitys_and_leaves_no_half_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last pooling layer is the mean over an 8x8 map; untrained weights, written as the file that is downloaded."""
    kind = inception._network_class()
    torch.manual_seed(0)
    monkeypatch.setitem(kind.__init__.__globals__, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(kind, "load_state_dict", lambda *_: None)
    untrained = kind("inception", ["2048"])
    monkeypatch.undo()
    torch.save(untrained.state_dict(), tmp_path / "weights.pth")
    network = InceptionFeatures(tmp_path / "weights.pth")
    maps: list[torch.Tensor] = []
    network.network.Mixed_7c.register_forward_hook(lambda *call: maps.append(call[-1]))
    features = network.features(images(2, 32))
    assert features.shape == (2, 2048)
    assert features == pytest.approx(maps[0].mean((2, 3)).numpy(), abs=1e-5)
    assert maps[0].shape[2:] == (8, 8)
    assert not [name for name in sys.modules if name.startswith("torch_fidelity")]
