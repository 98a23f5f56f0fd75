"""The published SDXS layouts, from folders and from a hub behind real HTTP: the same images as diffusers', and what is said of others."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image

from sdxs import registry
from sdxs.client import AsyncClient
from sdxs.control import Control
from sdxs.embedded import free_port
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound, PermissionDenied
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from sdxs.store import open_store
from services.local import serve_local
from services.settings import ServingSettings
from tests import published
from tests.hub import HttpHub, http_hub
from tests.models import END, LENGTH

DREAM, OLD, SKETCH = "owner/sdxs-512-dreamshaper", "owner/sdxs-512-0.9", "owner/sdxs-512-dreamshaper-sketch"
PROMPT = "red apple"


@dataclass(frozen=True)
class Folders:
    """What the repositories hold."""

    dream: Path
    old: Path
    sketch: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("published")
    dream = published.dreamshaper(root / "sdxs-512-dreamshaper")
    return Folders(dream, published.old(root / "sdxs-512-0.9"), published.sketch(root / "sketch", dream / "unet"))


@pytest.fixture
def hub(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpHub]:
    """All three; this process asks it, and has an empty cache."""
    with http_hub() as made:
        for name, folder in ((DREAM, folders.dream), (OLD, folders.old), (SKETCH, folders.sketch)):
            made.publish(name, folder)
        made.use(monkeypatch, tmp_path / "hf")
        yield made


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store_url=f"file://{tmp_path / 'store'}", cache_dir=tmp_path / "cache")


def theirs(pipeline: Any, seed: int, shape: tuple[int, int, int], **options: Any) -> np.ndarray:
    """diffusers' image of one step without guidance, float (H, W, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(latent_noise(seed, shape))[None].clone()
    told = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np"}
    found: np.ndarray = np.asarray(pipeline(PROMPT, latents=latents, **told, **options).images[0])
    return found


def difference(image: Image.Image, expected_HWC: np.ndarray) -> int:
    """The largest, in levels of 255. Raises AssertionError for an expected picture that is blank."""
    assert expected_HWC.std() > 0.01
    return int(np.abs(np.asarray(image, np.int16) - np.rint(expected_HWC * 255).astype(np.int16)).max())


@pytest.mark.parametrize("vae", ["", "vae_large"])
@pytest.mark.parametrize("name", ["dream", "old"])
def test_a_folder_as_published_draws_what_diffusers_draws(folders: Folders, settings: Settings, name: str, vae: str) -> None:
    folder: Path = getattr(folders, name)
    ours = OneStepPipeline.from_bundle(f"{folder}?vae={vae}" if vae else str(folder), settings)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    if vae:
        pipeline.vae = AutoencoderKL.from_pretrained(folder / "vae_large")
    assert difference(ours(PROMPT, seed=3)[0], theirs(pipeline, 3, ours.manifest.latent_shape)) <= 1


def test_constants_follow_from_the_configurations(folders: Folders, settings: Settings) -> None:
    """Those of the paper's two released models."""
    dream, old = (registry.open_model(str(folder), settings)[1] for folder in (folders.dream, folders.old))
    assert (dream.one_step.timestep, dream.one_step.input_scale) == (999, 1.0)
    assert dream.one_step.latent_coefficient == pytest.approx(14.642591, rel=1e-7)
    assert dream.one_step.output_coefficient == pytest.approx(-14.579279, rel=1e-7)
    assert (old.one_step.timestep, old.one_step.input_scale) == (999, pytest.approx(0.99767, abs=5e-6))
    assert old.one_step.latent_coefficient == -old.one_step.output_coefficient == pytest.approx(14.6146, abs=5e-5)
    assert (dream.text_width, old.text_width, old.latent_shape, old.image_size) == (32, 48, (4, 4, 4), 32)


def test_a_prediction_type_is_read(folders: Folders, settings: Settings, tmp_path: Path) -> None:
    """x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v, and x = sqrt(1 + sigma^2) z."""
    folder = published.old(tmp_path / "v", prediction_type="v_prediction")
    constants, plain = (registry.open_model(str(each), settings)[1].one_step for each in (folder, folders.old))
    sigma = plain.latent_coefficient
    assert constants.latent_coefficient == pytest.approx(sigma / (1 + sigma**2), rel=1e-5)
    assert constants.output_coefficient == pytest.approx(-sigma / (1 + sigma**2) ** 0.5, rel=1e-5)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    ours = OneStepPipeline.from_bundle(str(folder), settings)
    assert difference(ours(PROMPT, seed=3)[0], theirs(pipeline, 3, ours.manifest.latent_shape)) <= 1


def test_a_hub_id_is_the_folder_at_a_commit(hub: HttpHub, folders: Folders, settings: Settings) -> None:
    commit = hub.branches[DREAM, "main"]
    assert registry.pins(DREAM, settings) == [f"hf://{DREAM}@{commit}"]
    folder, manifest = registry.open_model(DREAM, settings)
    assert (manifest.name, manifest.lineage) == ("sdxs-512-dreamshaper", {"source": f"hf://{DREAM}@{commit}"})
    plain = registry.open_model(str(folders.dream), settings)[1]
    assert (manifest.one_step, manifest.image_size, manifest.text_width) == (plain.one_step, 32, 32)
    for reference in (f"{DREAM}@main", f"{DREAM}@{commit}", f"hf://{DREAM}"):
        assert registry.open_model(reference, settings) == (folder, manifest)
    images = [OneStepPipeline.from_bundle(each, settings)(PROMPT, seed=1)[0].tobytes() for each in (DREAM, str(folders.dream))]
    assert images[0] == images[1]


def test_only_what_is_needed_is_downloaded(hub: HttpHub, settings: Settings) -> None:
    """No pickles, pictures, cards, or the autoencoder that was not asked for."""
    _, manifest = registry.open_model(DREAM, settings)
    got = hub.downloaded()
    assert set(manifest.files) == got
    assert {path.partition("/")[0] for path in got} == {
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "model_index.json",
    }
    assert not any(path.endswith((".bin", ".png", ".md")) for path in got)
    registry.open_model(f"{DREAM}?vae=vae_large", settings)
    assert {path.partition("/")[0] for path in hub.downloaded() - got} == {"vae_large"}


def test_a_branch_that_moves_is_followed_and_a_commit_is_not(hub: HttpHub, settings: Settings, tmp_path: Path) -> None:
    first = registry.pins(DREAM, settings)[0]
    digest = registry.open_model(first, settings)[1].digest
    hub.publish(DREAM, published.dreamshaper(tmp_path / "next", seed=4))
    assert registry.open_model(DREAM, settings)[1].digest != digest
    assert registry.open_model(first, settings)[1].digest == digest


def test_a_hub_that_is_away_is_not_needed_again(
    folders: Folders, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http_hub() as hub:
        commit = hub.publish(DREAM, folders.dream)
        hub.use(monkeypatch, tmp_path / "hf")
        found = registry.open_model(DREAM, settings)
    assert registry.open_model(DREAM, settings) == found
    assert registry.pins(DREAM, settings) == [f"hf://{DREAM}@{commit}"]
    with pytest.raises(NotFound, match=f"model '{OLD}': no such folder, not downloaded yet, and the hub cannot be reached"):
        registry.open_model(OLD, settings)


def test_what_the_hub_does_not_give(hub: HttpHub, settings: Settings) -> None:
    with pytest.raises(NotFound, match="model 'owner/nothing': no such folder, and the hub has none or does not show it"):
        registry.open_model("owner/nothing", settings)
    with pytest.raises(NotFound, match=f"model '{DREAM}@gone'"):
        registry.open_model(f"{DREAM}@gone", settings)
    hub.gated.add(OLD)
    with pytest.raises(PermissionDenied, match=f"model '{OLD}': the hub gives it only to those who asked for it; set HF_TOKEN"):
        registry.open_model(OLD, settings)


def test_a_cache_that_lost_a_file_is_fetched_again(hub: HttpHub, settings: Settings, tmp_path: Path) -> None:
    _, manifest = registry.open_model(DREAM, settings)
    shutil.rmtree(tmp_path / "hf")
    folder, again = registry.open_model(DREAM, settings)
    assert again == manifest and (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("base", ["folder", "hub"])
def test_a_lone_controlnet_joins_a_model(hub: HttpHub, folders: Folders, settings: Settings, base: str) -> None:
    """And steers as in diffusers' own pipeline."""
    reference = (
        f"{folders.dream}?controlnet={folders.sketch}&name=drawn" if base == "folder" else f"{DREAM}?controlnet={SKETCH}"
    )
    ours = OneStepPipeline.from_bundle(reference, settings)
    name = {"folder": "sketch", "hub": "sdxs-512-dreamshaper-sketch"}[base]
    assert ours.manifest.controlnets == {name: ()}
    assert ours.manifest.name == ("drawn" if base == "folder" else "sdxs-512-dreamshaper")
    map_HWC = np.zeros((32, 32, 3), np.uint8)
    map_HWC[8:24, 10:14] = 255
    drawing = Image.fromarray(map_HWC)
    image = ours(PROMPT, seed=2, controls=[Control(_png(drawing), controlnet=name, preprocessed=True)])[0]
    network = ControlNetModel.from_pretrained(folders.sketch)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(folders.dream, controlnet=network, torch_dtype=torch.float32)
    expected = theirs(pipeline, 2, ours.manifest.latent_shape, image=drawing)
    assert difference(image, expected) <= 1
    assert difference(ours(PROMPT, seed=2)[0], expected) > 1


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_all_options_at_once_are_pinned(hub: HttpHub, folders: Folders, settings: Settings) -> None:
    reference = f"{DREAM}?vae=vae_large&controlnet={SKETCH}&controlnet={folders.sketch}&name=large"
    [pin] = registry.pins(reference, settings)
    commits = {name: hub.branches[name, "main"] for name in (DREAM, SKETCH)}
    first, second = f"hf://{DREAM}@{commits[DREAM]}", f"hf://{SKETCH}@{commits[SKETCH]}"
    assert pin == f"{first}?vae=vae_large&controlnet={second}&controlnet={folders.sketch}&name=large"
    folder, manifest = registry.open_model(pin, settings)
    assert registry.open_model(reference, settings) == (folder, manifest)
    assert (manifest.name, sorted(manifest.controlnets)) == ("large", ["sdxs-512-dreamshaper-sketch", "sketch"])
    assert manifest.lineage == {"source": first, "controlnet.sdxs-512-dreamshaper-sketch": second}
    assert json.loads((folder / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert StableDiffusionPipeline.from_pretrained(folder).vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize("base", ["folder", "hub"])
def test_a_published_model_goes_into_the_store_of_models(
    hub: HttpHub, folders: Folders, settings: Settings, base: str, tmp_path: Path
) -> None:
    """Where other machines find it without the hub."""
    store = open_store(settings, "models")
    folder, sealed = registry.open_sealed(f"{folders.old}?name=old" if base == "folder" else f"{OLD}?name=old", settings)
    digest = registry.publish(folder, store).digest
    registry.promote("old", digest, store)
    elsewhere = settings.model_copy(update={"cache_dir": tmp_path / "elsewhere"})
    folder, manifest = registry.open_model("old", elsewhere)
    assert manifest == sealed and not any(path.is_symlink() for path in folder.rglob("*"))
    plain = registry.open_sealed(folders.old, settings)
    assert (plain[1].name, plain[1].one_step) == ("sdxs-512-0.9", sealed.one_step)


def test_options_of_a_name_follow_it(settings: Settings, folders: Folders, tmp_path: Path) -> None:
    """A bundle that ships, with a part of a folder that does not fit it: refused with the setting at fault."""
    digest = registry.pins("emoji", settings)[0]
    assert registry.pins("emoji?name=mine", settings) == [f"{digest}?name=mine"]
    mine = registry.open_model("emoji?name=mine", settings)[1]
    assert (mine.name, mine.one_step) == ("mine", registry.open_model("emoji", settings)[1].one_step)
    with pytest.raises(InvalidRequest, match=r"controlnet: got 'sketch'.*for this U-Net, whose cross_attention_dim is"):
        registry.open_model(f"emoji?controlnet={folders.sketch}", settings)


def test_fp16_weights_alone_are_found(folders: Folders, settings: Settings, tmp_path: Path) -> None:
    folder = published.fp16_alone(folders.dream, tmp_path / "half")
    images = [OneStepPipeline.from_bundle(str(each), settings)(PROMPT, seed=1)[0].tobytes() for each in (folder, folders.dream)]
    assert images[0] == images[1]


@pytest.mark.parametrize("base", ["folder", "hub"])
def test_pickles_alone_are_not_read(hub: HttpHub, folders: Folders, settings: Settings, tmp_path: Path, base: str) -> None:
    folder = Path(shutil.copytree(folders.dream, tmp_path / "pickles"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    hub.publish("owner/pickles", folder)
    with pytest.raises(
        CorruptArtifact, match=r"unet/diffusion_pytorch_model\.safetensors is missing; other formats are not read"
    ):
        registry.open_model(str(folder) if base == "folder" else "owner/pickles", settings)
    assert not any(path.endswith(".bin") for path in hub.downloaded())


def test_many_may_open_at_once(hub: HttpHub, settings: Settings) -> None:
    """As the replicas of a server do that were started without a command that downloads first."""
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: registry.open_model(f"{DREAM}?vae=vae_large", settings), range(16)))
    assert len({(folder, manifest.digest) for folder, manifest in found}) == 1
    assert [path.name for path in found[0][0].parent.iterdir()] == [found[0][1].digest.removeprefix("sha256:")]


def _set(file: str, **values: Any) -> Any:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


SCHEDULER = "scheduler/scheduler_config.json"
SPOILT: list[tuple[Any, type[Exception], str]] = [
    (_set(SCHEDULER, _class_name="EulerDiscreteScheduler", timestep_spacing="leading"), InvalidRequest,
     "scheduler: got 'EulerDiscreteScheduler', allowed: one whose single step begins at the last timestep, 999.*not at 1"),
    (_set(SCHEDULER, _class_name="PNDMScheduler", skip_prk_steps=True), InvalidRequest, "scheduler: got 'PNDMScheduler'"),
    (_set(SCHEDULER, _class_name="EulerDiscreteScheduler", prediction_type="score"), CorruptArtifact, "scheduler_config.json.*score"),
    (_set(SCHEDULER, _class_name="NoScheduler"), CorruptArtifact, "'NoScheduler' is not a scheduler of diffusers"),
    (_set("unet/config.json", cross_attention_dim=64), CorruptArtifact, "cross_attention_dim is 64, but the text encoder's width is 32"),
    (_set("unet/config.json", in_channels=9), CorruptArtifact, "in_channels is 9, but vae/ has latents of 4"),
    (_set("unet/config.json", sample_size=[4, 8]), CorruptArtifact, "sample_size is"),
    (_set("tokenizer/tokenizer_config.json", model_max_length=10**30), CorruptArtifact, "model_max_length"),
    (lambda f: shutil.rmtree(f / "scheduler"), CorruptArtifact, "scheduler_config.json is missing"),
    (lambda f: shutil.rmtree(f / "vae"), CorruptArtifact, "vae/config.json is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "words"), SPOILT)
def test_what_cannot_be_derived_is_named(
    folders: Folders, settings: Settings, tmp_path: Path, spoil: Any, kind: type[Exception], words: str
) -> None:
    folder = Path(shutil.copytree(folders.dream, tmp_path / "spoilt"))
    spoil(folder)
    with pytest.raises(kind, match=words):
        registry.open_model(str(folder), settings)


def test_wrong_parts_are_named(folders: Folders, hub: HttpHub, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="vae: got 'vae_huge', allowed: one of the model's autoencoders: vae, vae_large"):
        registry.open_model(f"{folders.dream}?vae=vae_huge", settings)
    for reference in (SKETCH, str(folders.sketch)):
        with pytest.raises(InvalidRequest, match="a ControlNet alone, for MODEL"):
            registry.open_model(reference, settings)
    with pytest.raises(InvalidRequest, match=r"controlnet: got 'unet'.*this has UNet2DConditionModel"):
        registry.open_model(f"{folders.dream}?controlnet={folders.dream / 'unet'}", settings)
    with pytest.raises(NotFound, match=r"controlnet '\./nowhere'"):
        registry.open_model(f"{folders.dream}?controlnet=./nowhere", settings)
    with pytest.raises(InvalidRequest, match="two are called 'sketch'"):
        registry.open_model(f"{folders.dream}?controlnet={folders.sketch}&controlnet={folders.sketch}", settings)
    with pytest.raises(InvalidRequest, match=r"controlnet: got 'sketch'.*whose cross_attention_dim is 48; this one's is 32"):
        registry.open_model(f"{folders.old}?controlnet={folders.sketch}", settings)


@pytest.mark.parametrize("options", ["", "vae", "vae=", "vae=a&vae=b", "vae=../x", "name=A b", "size=9", "controlnet="])
def test_options_that_are_none(options: str, settings: Settings) -> None:
    with pytest.raises(InvalidRequest, match=r"model: got 'emoji\?"):
        registry.open_model(f"emoji?{options}", settings)


def test_padding_is_the_tokenizers_own(folders: Folders, settings: Settings) -> None:
    """It is not masked, so that another one would be another picture."""
    for folder, padding in ((folders.dream, END), (folders.old, published.SD2_PADDING)):
        [(tokenizer, _)] = OneStepPipeline.from_bundle(str(folder), settings).text_encoder.encoders
        ids = tokenizer("a", padding="max_length", max_length=LENGTH)["input_ids"]
        assert ids[3:] == [tokenizer.convert_tokens_to_ids(padding)] * (LENGTH - 3)


@pytest.mark.parametrize("name", ["dream", "old"])
def test_an_image_to_start_from(folders: Folders, settings: Settings, name: str) -> None:
    """The weaker, the nearer; at strength 1 it does not count."""
    ours = OneStepPipeline.from_bundle(f"{getattr(folders, name)}?vae=vae_large", settings)
    file = _png(Image.effect_noise((32, 32), 80).convert("RGB"))
    images = [ours(PROMPT, seed=2, init_image=file, strength=strength)[0] for strength in (0.05, 0.5, 1.0)]
    assert images[2].tobytes() == ours(PROMPT, seed=2)[0].tobytes()
    assert len({image.tobytes() for image in images}) == 3


@pytest.mark.parametrize("fused", [False, True])
async def test_a_server_in_one_process(hub: HttpHub, folders: Folders, settings: Settings, fused: bool) -> None:
    """Two models at once: one of the hub with everything in its reference, one of a folder as it is."""
    reference = f"{DREAM}?vae=vae_large&controlnet={SKETCH}&name=drawn"
    serving = ServingSettings(
        redis_url="", gateway_address=f"127.0.0.1:{free_port()}", drain_s=1, cache_dir=settings.cache_dir, models_watch_s=0.1
    )
    control = Control(_png(Image.new("RGB", (32, 32), "white")), "sketch", preprocessed=True)
    drawn, plain = (OneStepPipeline.from_bundle(each, settings) for each in (reference, str(folders.old)))
    async with (
        serve_local([reference, str(folders.old)], serving, fused),
        AsyncClient(serving.gateway_address) as client,
    ):
        asked = len(hub.asked)
        models = await client.list_models()
        assert [(model.name, model.digest) for model in models] == [
            ("drawn", drawn.manifest.digest), ("sdxs-512-0.9", plain.manifest.digest),
        ]  # fmt: skip
        for model, ours, controls in (("drawn", drawn, [control]), ("sdxs-512-0.9", plain, [])):
            answer = await client.generate(PROMPT, seed=3, format="raw", model=model, controls=controls)
            assert answer.images[0].data == ours(PROMPT, seed=3, controls=controls)[0].tobytes()
            assert answer.receipt.model_digest == ours.manifest.digest
        await asyncio.sleep(0.5)
        assert len(hub.asked) == asked, "a branch is looked at once"


@pytest.mark.timeout(120)
def test_the_command_line_draws_with_a_model_of_the_hub(hub: HttpHub, tmp_path: Path) -> None:
    """As a newcomer runs it: without a word of the hub's settings but where it is."""
    variables = hub.variables(tmp_path / "hub") | {"SDXS_CACHE_DIR": str(tmp_path / "bundles")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SDXS_"))} | variables
    del environment["HF_HUB_OFFLINE"]
    sdxs = str(Path(sys.executable).with_name("sdxs"))
    command = [sdxs, "generate", PROMPT, "-o", str(tmp_path / "made.png"), "--model", DREAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "made.png") as made:
        assert made.size == (32, 32)
