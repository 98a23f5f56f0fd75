"""Feature encoders and the heads on them: against their own networks, called directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from sdxs.errors import InvalidRequest
from trainer.models.conditioning import Conditioning
from trainer.models.discriminators import MidClassifier, ProjectedDiscriminator
from trainer.models.features import DinoV2Encoder, FeatureEncoder, VGGEncoder, check_encoder, load_encoder
from trainer.objectives.gan import classifier_loss, discriminator_hinge, generator_hinge, generator_loss

TEXT = Conditioning(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3)))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def decode(latent_BCHW: Tensor) -> Tensor:
    """Latents of three channels as images eight times as large."""
    return latent_BCHW.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def latents(size: int = 8) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def normalised(latent_BCHW: Tensor) -> Tensor:
    image = decode(latent_BCHW).numpy().transpose(0, 2, 3, 1)
    return torch.from_numpy(((image / 2 + 0.5 - MEAN) / STD).transpose(0, 3, 1, 2)).float()


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights by torchvision's names, with a classifier that is left alone."""
    torch.manual_seed(0)
    shapes, number, previous = {}, 0, 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if width:
            shapes[f"features.{number}"] = (width, previous)
            previous, number = width, number + 2
        else:
            number += 1
    state = {"classifier.0.weight": torch.zeros(2, 2)}
    for name, (width, inputs) in shapes.items():
        state |= {
            f"{name}.weight": torch.randn(width, inputs, 3, 3) / (3 * inputs**0.5),
            f"{name}.bias": torch.randn(width) * 0.1,
        }
    folder = tmp_path_factory.mktemp("vgg")
    save_file(state, folder / "model.safetensors")
    torch.save(state, folder.parent / "vgg16.pth")
    return folder


def test_vgg_is_its_convolutions_called_by_hand(vgg: Path) -> None:
    encoder = load_encoder("vgg", str(vgg), vgg, decode)
    found = encoder(latents(), TEXT)
    state = torch.load(vgg.parent / "vgg16.pth", weights_only=True)
    hidden, expected, number = normalised(latents()), [], 0
    for layers in (2, 2, 3, 3, 3):
        for _ in range(layers):
            hidden = F.conv2d(hidden, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1).relu()
            number += 2
        expected.append(hidden)
        hidden, number = F.max_pool2d(hidden, 2), number + 1
    assert number == 31  # torchvision's count of layers
    assert [feature.shape[1] for feature in found] == encoder.channels
    for feature, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(feature, wanted, rtol=1e-4, atol=1e-4)


def test_vgg_loads_from_a_file_of_either_kind(vgg: Path) -> None:
    one, other = (
        VGGEncoder.load(str(path), decode).state_dict() for path in (vgg / "model.safetensors", vgg.parent / "vgg16.pth")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    size = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size, intermediate_size=32)).save_pretrained(folder)
    return folder


def test_dino_is_its_hidden_states_as_maps(dino: Path) -> None:
    encoder = load_encoder("dinov2", str(dino), dino, decode)
    latent = latents(14)[:, :, :, :7].repeat(1, 1, 1, 3)  # images of 112 x 168 pixels, 8 x 12 patches: nothing is resized
    found = encoder(latent, TEXT)
    network = Dinov2Model.from_pretrained(dino).eval()
    with torch.no_grad():
        states = network(normalised(latent), output_hidden_states=True).hidden_states
    assert len(found) == len(encoder.channels) == 4
    for feature, layer in zip(found, (2, 4, 6, 8), strict=True):
        assert feature.shape == (2, 16, 8, 12)
        for row, column in ((0, 0), (1, 3), (7, 11)):
            token = states[layer][:, 1 + 12 * row + column]  # after the class token, row by row
            torch.testing.assert_close(feature[:, :, row, column], token, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(4, 4, (98, 98)), (14, 14, (112, 112)), (9, 18, (98, 196)), (15, 30, (112, 238))]
)
def test_images_become_whole_patches_and_keep_their_form(
    dino: Path, height: int, width: int, expected: tuple[int, int]
) -> None:
    encoder = DinoV2Encoder.load(str(dino), decode)
    assert encoder.pixels(torch.zeros(1, 3, height, width)).shape[-2:] == expected


def test_small_images_are_enlarged_for_vgg_and_large_ones_are_not(vgg: Path) -> None:
    encoder = VGGEncoder.load(str(vgg), decode)
    assert [f.shape[-2:] for f in encoder(torch.zeros(1, 3, 4, 8), TEXT)] == [(64 >> i, 128 >> i) for i in range(5)]
    assert encoder.pixels(torch.zeros(1, 3, 10, 9)).shape[-2:] == (80, 72)


@pytest.mark.parametrize("kind", ["vgg", "dinov2"])
def test_images_are_resized_and_normalised_in_float32_under_autocast(kind: str, vgg: Path, dino: Path) -> None:
    """Antialiasing has no bfloat16 on a CPU, and a normalised pixel no 8 bits in it."""
    encoder = load_encoder(kind, str({"vgg": vgg, "dinov2": dino}[kind]), vgg, lambda latent: decode(latent).bfloat16())
    latent = latents(4).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(latent, TEXT)
    expected = load_encoder(kind, str({"vgg": vgg, "dinov2": dino}[kind]), vgg, decode)(latent, TEXT)
    for feature, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(feature.float(), wanted, rtol=0.1, atol=0.1 * float(wanted.std()))


@pytest.mark.parametrize("kind", ["vgg", "dinov2"])
def test_a_source_that_is_something_else_is_refused(kind: str, tmp_path: Path, vgg: Path) -> None:
    other = tmp_path / "clip"
    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 14,
        "patch_size": 7,
    }
    CLIPVisionModel(CLIPVisionConfig(**size)).save_pretrained(other)
    for source in (str(other), str(tmp_path / "nowhere")):
        with pytest.raises(InvalidRequest, match="encoder_source"):
            load_encoder(kind, source, vgg, decode)


def test_sources_are_checked_without_their_weights(vgg: Path, dino: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    check_encoder("dinov2", str(tmp_path))  # a configuration is all that is read
    check_encoder("unet", None)
    for source in (vgg, vgg / "model.safetensors", vgg.parent / "vgg16.pth"):
        check_encoder("vgg", str(source))
    with pytest.raises(InvalidRequest, match="weights"):
        load_encoder("dinov2", str(tmp_path), vgg, decode)


def test_dino_with_a_weight_missing_is_refused(dino: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    state = load_file(dino / "model.safetensors")
    del state["encoder.layer.3.norm1.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidRequest, match=r"encoder_source.*norm1\.weight is missing"):
        load_encoder("dinov2", str(tmp_path), dino, decode)


class Payload:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


def test_files_that_are_no_state_dict_are_refused(vgg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shallow = {name: value for name, value in load_file(vgg / "model.safetensors").items() if "28" not in name}
    save_file(shallow, tmp_path / "vgg11.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    (tmp_path / "broken.pth").write_bytes(b"nonsense")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"features.0.weight": Payload()}, tmp_path / "code.pth")
    for path in [*tmp_path.iterdir(), tmp_path]:  # the folder has several files, none of them model.safetensors
        with pytest.raises(InvalidRequest, match="encoder_source"):
            check_encoder("vgg", str(path))
    assert capsys.readouterr().out == ""


def unet_of(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=4, **more,
    )  # fmt: skip


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 12}
POOLED = Conditioning(TEXT.text_BLD, torch.ones(2, 12), torch.tensor([[8.0, 8, 0, 0, 8, 8]]).expand(2, 6))


@pytest.mark.parametrize(("more", "conditioning"), [({}, TEXT), (SDXL, POOLED)])
def test_the_unets_features_are_those_of_its_forward_call(
    more: dict[str, Any], conditioning: Conditioning, tmp_path: Path
) -> None:
    """Taken by hooks from a whole forward call at t = 0, with SDXL's added embedding and without."""
    unet_of(**more).save_pretrained(tmp_path)
    whole, taken = UNet2DConditionModel.from_pretrained(tmp_path).eval(), []
    for block in whole.down_blocks:
        block.register_forward_hook(lambda _module, _inputs, output: taken.append(output[0]))
    with torch.no_grad():
        whole(latents(), torch.tensor(0), **conditioning.arguments())
    encoder = load_encoder("unet", None, tmp_path, None)
    latent = latents().requires_grad_(True)
    found = encoder(latent, conditioning)
    assert found[0] is latent
    assert [feature.shape[1] for feature in found] == encoder.channels
    for feature, wanted in zip(found[1:], taken, strict=True):
        torch.testing.assert_close(feature, wanted, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found[-1].square().sum(), latent)
    assert gradient.abs().sum() > 0
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_unets_features_follow_the_added_conditioning(tmp_path: Path) -> None:
    unet_of(**SDXL).save_pretrained(tmp_path)
    encoder = load_encoder("unet", None, tmp_path, None)
    smaller = Conditioning(POOLED.text_BLD, POOLED.pooled_BD, torch.full((2, 6), 4.0))
    assert not torch.allclose(encoder(latents(), POOLED)[1], encoder(latents(), smaller)[1])


@pytest.mark.parametrize("kind", ["vgg", "dinov2"])
def test_gradients_reach_the_latent_and_nothing_else(kind: str, vgg: Path, dino: Path) -> None:
    encoder = load_encoder(kind, str({"vgg": vgg, "dinov2": dino}[kind]), vgg, decode)
    latent = latents().requires_grad_(True)
    torch.stack([feature.square().mean() for feature in encoder(latent, TEXT)]).sum().backward()
    assert latent.grad is not None
    assert latent.grad.abs().min() >= 0 and latent.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in encoder.parameters())


class Levels(FeatureEncoder):
    """The latent and its averages."""

    channels = [3, 3]  # noqa: RUF012

    def forward(self, latent_BCHW: Tensor, conditioning: Conditioning) -> list[Tensor]:
        return [latent_BCHW, F.avg_pool2d(latent_BCHW, latent_BCHW.shape[-1])]  # the second is a single place


def test_trained_heads_push_generated_samples_towards_real_ones() -> None:
    """Real samples have a positive gradient from left to right, generated ones none."""
    torch.manual_seed(0)
    judge = ProjectedDiscriminator(Levels(), text_width=16, width=8)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    ramp = torch.linspace(-1, 1, 8).expand(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        noise = 0.3 * torch.randn(2, 2, 3, 8, 8, generator=generator)
        loss = discriminator_hinge(judge(ramp + noise[0], TEXT), judge(noise[1], TEXT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.5  # from 2; the second level cannot tell them apart
    fake = torch.zeros(2, 3, 8, 8, requires_grad=True)
    generator_hinge(judge(fake + noise[1], TEXT)).backward()
    assert fake.grad is not None
    assert float((-fake.grad * ramp).sum()) > 0
    assert not any(name.startswith("_encoder") for name in judge.state_dict())


def test_heads_learn_what_each_prompt_asks_for() -> None:
    """Real samples rise from left to right for one prompt and fall for the other, generated ones the other way round: of all samples
    together there is nothing to learn."""
    torch.manual_seed(0)
    judge = ProjectedDiscriminator(Levels(), text_width=16, width=16)
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    text = TEXT.rows(torch.tensor([0, 1] * 4))
    ramp = torch.linspace(-1, 1, 8).expand(8, 3, 8, 8) * torch.tensor([1.0, -1.0] * 4).view(-1, 1, 1, 1)
    for _ in range(60):
        noise = 0.3 * torch.randn(2, 8, 3, 8, 8, generator=generator)
        loss = discriminator_hinge(judge(ramp + noise[0], text), judge(noise[1] - ramp, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.3  # from 2; the second level cannot tell them apart
    fake = (noise[1] - ramp).requires_grad_(True)
    generator_hinge(judge(fake, text)).backward()
    assert fake.grad is not None
    assert ((-fake.grad * ramp).sum(dim=(1, 2, 3)) > 0).all()


def test_the_classifier_gives_one_logit_a_sample() -> None:
    torch.manual_seed(0)
    net, feature = MidClassifier(16), torch.randn(3, 16, 2, 2)
    logits = net(feature)
    assert logits.shape == (3,)
    torch.testing.assert_close(net(feature[1:2])[0], logits[1])


def test_a_trained_classifier_pushes_generated_features_towards_real_ones() -> None:
    """Both kinds normalised alike, so that only their form tells them apart."""
    torch.manual_seed(0)
    net = MidClassifier(32)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    form = torch.tensor([-1.0, 1.0]).repeat(16).view(1, 32, 1, 1).expand(8, 32, 4, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        noise = torch.randn(2, 8, 32, 4, 4, generator=generator)
        loss = classifier_loss(net(form + 0.3 * noise[0]), net(noise[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7  # from 2 ln 2
    fake = torch.randn(8, 32, 4, 4, generator=generator).requires_grad_(True)
    before = generator_loss(net(fake))
    (gradient,) = torch.autograd.grad(before, fake)
    assert float((-gradient * form).sum()) > 0
    assert float(generator_loss(net(fake + 0.5 * form)).detach()) < float(before.detach())
