"""LoRAs in this process, against diffusers' own way with the same files."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sdxs import Lora, bundle
from sdxs.errors import InvalidRequest, NotFound
from sdxs.lora import files
from sdxs.lora.published import FILE
from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline
from tests.loras import diffusers_draws, peft_adapter, tiny_lora
from tests.models import tiny_folder, tiny_sdxl

PROMPT = "red apple"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "tiny")
    bundle.seal(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def pipeline(model: Path) -> OneStepPipeline:
    return OneStepPipeline.from_bundle(model)


@pytest.fixture(scope="module")
def style(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lora(model, tmp_path_factory.mktemp("style"), seed=1)


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the U-Net alone, with another rank and PEFT's other scaling."""
    return tiny_lora(model, tmp_path_factory.mktemp("other"), seed=2, text=(), r=4, lora_alpha=2, use_rslora=True)


def drawn(pipeline: OneStepPipeline, loras: list[tuple[Path, float]], seed: int = 3) -> np.ndarray:
    """A latent, (C, H, W)."""
    uses = pipeline.loras.uses([Lora(path, scale) for path, scale in loras])
    noise_BCHW = latent_noise(seed, pipeline.unet.latent_shape)[None]
    with pipeline.text_encoder.adapters.use(uses):
        text = pipeline.text_encoder.encode([PROMPT])
    with pipeline.unet.adapters.use(uses):
        found: np.ndarray = pipeline.unet.denoise(noise_BCHW, text)[0]
    return found


def expected(
    pipeline: OneStepPipeline, model: Path, loras: list[tuple[Path, float]], seed: int = 3, kind: str = "latent"
) -> np.ndarray:
    noise_CHW = latent_noise(seed, pipeline.unet.latent_shape)
    return np.asarray(diffusers_draws(model, PROMPT, noise_CHW, loras, kind))


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.7])
def test_a_lora_draws_what_diffusers_draws_with_it(model: Path, pipeline: OneStepPipeline, style: Path, scale: float) -> None:
    found = drawn(pipeline, [(style, scale)])
    assert np.abs(found - expected(pipeline, model, [(style, scale)])).max() < 1e-4
    assert np.abs(found - drawn(pipeline, [])).max() > 0.05
    image = pipeline.decoder.paint(found[None])[0]
    assert np.abs(image - expected(pipeline, model, [(style, scale)], kind="np")).max() < 1e-4


def test_several_add_up_as_in_diffusers(model: Path, pipeline: OneStepPipeline, style: Path, other: Path) -> None:
    both = [(style, 0.8), (other, 1.5)]
    found = drawn(pipeline, both)
    assert np.abs(found - expected(pipeline, model, both)).max() < 1e-4
    for one in both:
        assert np.abs(found - drawn(pipeline, [one])).max() > 0.05


@pytest.mark.parametrize("options", [{"use_dora": True}, {"rank_pattern": {"to_q": 5}, "alpha_pattern": {"to_k": 1}}])
def test_what_the_configuration_says_counts(
    model: Path, pipeline: OneStepPipeline, tmp_path: Path, options: dict[str, Any]
) -> None:
    made = tiny_lora(model, tmp_path, seed=4, text=(), **options)
    assert np.abs(drawn(pipeline, [(made, 1.0)]) - expected(pipeline, model, [(made, 1.0)])).max() < 1e-4


def test_a_file_without_a_configuration_goes_by_its_ranks(
    model: Path, pipeline: OneStepPipeline, style: Path, tmp_path: Path
) -> None:
    save_file(load_file(style / FILE), tmp_path / "plain.safetensors")
    plain = tmp_path / "plain.safetensors"
    found = drawn(pipeline, [(plain, 1.0)])
    assert np.abs(found - expected(pipeline, model, [(plain, 1.0)])).max() < 1e-4
    assert np.abs(found - drawn(pipeline, [(style, 1.0)])).max() > 0.05  # whose alpha is not its rank


def test_names_of_before_transformers_5_mean_the_same(model: Path, pipeline: OneStepPipeline, tmp_path: Path) -> None:
    """Those of the tensors, and those in PEFT's configuration."""
    layer = "encoder.layers.0.self_attn.q_proj"
    made = tiny_lora(model, tmp_path / "made", seed=6, unet=(), alpha_pattern={layer: 9}, rank_pattern={layer: 4})
    weights = files.read(made)
    assert weights.config is not None
    older = {
        name: {f"text_model.{key}": number for key, number in value.items()} if name.endswith("_pattern") else value
        for name, value in weights.config.items()
    }
    tensors = {name.replace("text_encoder.", "text_encoder.text_model."): value for name, value in weights.tensors.items()}
    files.save(files.LoraWeights(tensors, None, older), tmp_path / "older.safetensors")
    found = drawn(pipeline, [(tmp_path / "older.safetensors", 1.0)])
    assert (found == drawn(pipeline, [(made, 1.0)])).all()
    assert np.abs(found - expected(pipeline, model, [(made, 1.0)])).max() < 1e-4


def test_kohyas_names_and_alphas_are_read(model: Path, pipeline: OneStepPipeline, style: Path, tmp_path: Path) -> None:
    kohya: dict[str, torch.Tensor] = {}
    for name, value in load_file(style / FILE).items():
        if "attn1.to_q" in name or "text_encoder" in name:
            layer, _, matrix = name.partition(".lora")
            network, _, rest = layer.partition(".")
            layer = f"lora_{'unet' if network == 'unet' else 'te_text_model'}_{rest.replace('.', '_')}"
            kohya[f"{layer}.lora_{'down' if '_A' in matrix or '.down' in matrix else 'up'}.weight"] = value
            kohya[f"{layer}.alpha"] = torch.tensor(1.0 if network == "unet" else 4.0)
    file = tmp_path / "kohya.safetensors"
    save_file(kohya, file)
    found = drawn(pipeline, [(file, 1.0)])
    assert np.abs(found - expected(pipeline, model, [(file, 1.0)])).max() < 1e-4
    assert np.abs(found - drawn(pipeline, [])).max() > 0.05


def test_what_peft_saved_equals_its_weights_merged(model: Path, pipeline: OneStepPipeline, tmp_path: Path) -> None:
    folder = peft_adapter(model, tmp_path / "adapter", seed=5, lora_alpha=6)
    merged = tmp_path / "merged"
    shutil.copytree(model, merged)
    weights = load_file(merged / "unet/diffusion_pytorch_model.safetensors")
    state = load_file(folder / "adapter_model.safetensors")
    for name, down in state.items():
        layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_A.")
        if rest:
            up = state[name.replace("lora_A", "lora_B")]
            change = up @ down if up.dim() == 2 else torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
            weights[f"{layer}.weight"] += 0.5 * 6 / 2 * change
    save_file(weights, merged / "unet/diffusion_pytorch_model.safetensors")
    bundle.seal(merged, "merged")
    found, plain = drawn(pipeline, [(folder, 0.5)]), drawn(pipeline, [])
    assert np.abs(found - drawn(OneStepPipeline.from_bundle(merged), [])).max() < 1e-4
    assert np.abs(found - plain).max() > 0.05


def test_both_text_encoders_of_sdxl(tmp_path: Path) -> None:
    """PEFT's folders, one for each network, against PEFT's own merge."""
    model = tiny_sdxl(tmp_path / "model")
    pipeline, merged = OneStepPipeline.from_bundle(model), OneStepPipeline.from_bundle(model)
    for seed, (_, network) in enumerate(merged.text_encoder.encoders):
        torch.manual_seed(seed)
        tuned = get_peft_model(network, LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "fc2"]))
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.2)
        tuned.save_pretrained(str(tmp_path / "style" / ("text_encoder_2" if seed else "text_encoder")))
        tuned.merge_adapter()
    wanted, plain = merged.text_encoder.encode([PROMPT]), pipeline.text_encoder.encode([PROMPT])
    with pipeline.text_encoder.adapters.use(pipeline.loras.uses([Lora(tmp_path / "style")])):
        found = pipeline.text_encoder.encode([PROMPT])
    for ours, theirs, before in (
        (found.text_BLD, wanted.text_BLD, plain.text_BLD),
        (found.pooled_BD, wanted.pooled_BD, plain.pooled_BD),
    ):
        assert ours is not None and theirs is not None and before is not None
        assert np.abs(ours - theirs).max() < 1e-4 < 0.01 < np.abs(ours - before).max()


def test_scale_0_and_none_at_all_are_the_same_bytes(model: Path, style: Path, other: Path) -> None:
    fresh, used = OneStepPipeline.from_bundle(model), OneStepPipeline.from_bundle(model)
    before = np.asarray(fresh(PROMPT, 3)[0])
    assert (np.asarray(used(PROMPT, 3, loras=[Lora(style, 0.0)])[0]) == before).all()
    assert (np.asarray(used(PROMPT, 3, loras=[Lora(style), Lora(other)])[0]) != before).any()
    assert (np.asarray(used(PROMPT, 3)[0]) == before).all()
    only = np.asarray(used(PROMPT, 3, loras=[Lora(other)])[0])
    assert (np.asarray(used(PROMPT, 3, loras=[Lora(style, 0), Lora(other)])[0]) == only).all()


def test_the_oldest_leave_and_come_back_the_same(model: Path, pipeline: OneStepPipeline, tmp_path: Path) -> None:
    made = [tiny_lora(model, tmp_path / str(i), seed=10 + i, text=("q_proj",), unet=("to_q",)) for i in range(17)]
    first = drawn(pipeline, [(made[0], 1.0)])
    for each in made[1:]:
        drawn(pipeline, [(each, 1.0)])
    layer = pipeline.unet.network.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    assert len(layer.lora_A) == 16
    assert (drawn(pipeline, [(made[0], 1.0)]) == first).all()


def test_to_attach_one_leaves_the_networks_in_place_as_they_are(model: Path, style: Path) -> None:
    """Somebody may be computing with them."""
    unet = OneStepPipeline.from_bundle(model).unet
    before, modules = unet.network, [type(module) for module in unet.network.modules()]
    dressed = unet.adapters.attached("style", unet.adapters.fit(files.read(style), "", ""))
    assert unet.network is before and [type(module) for module in before.modules()] == modules
    unet.adapters.put(dressed)
    ours = {weight.data_ptr() for name, weight in unet.network.named_parameters() if ".lora_" not in name}
    assert ours == {weight.data_ptr() for weight in before.parameters()}, "the same memory"


def test_what_is_detached_is_freed_at_once(model: Path, style: Path) -> None:
    """Without the garbage collector, which has better things to do on a busy replica."""
    adapters = OneStepPipeline.from_bundle(model).unet.adapters
    adapters.put(adapters.attached("style", adapters.fit(files.read(style), "", "")))
    gc.collect()
    gc.disable()
    try:
        network = weakref.ref(adapters.networks["unet"])
        weight = weakref.ref(next(weight for name, weight in adapters.networks["unet"].named_parameters() if ".style." in name))
        adapters.put(adapters.detached("style"))
        assert (network(), weight()) == (None, None)
    finally:
        gc.enable()


def wrong(pipeline: OneStepPipeline, loras: list[Lora]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as found:
        pipeline(PROMPT, loras=loras)
    return found.value


def test_what_does_not_fit_is_refused_with_its_first_layer_and_their_number(
    model: Path, pipeline: OneStepPipeline, style: Path, tmp_path: Path
) -> None:
    state = load_file(style / FILE)
    renamed = {name.replace("up_blocks.0", "up_blocks.7"): value for name, value in state.items()}
    save_file(renamed, tmp_path / "blocks.safetensors")
    error = wrong(pipeline, [Lora(tmp_path / "blocks.safetensors")])
    count = len({name.partition(".lora")[0] for name in renamed if "up_blocks.7" in name})
    assert error.field == "loras[0].name"
    assert "up_blocks.7" in error.allowed and f"{count - 1} more" in error.allowed
    save_file(
        {name: value.repeat(1, 2) if "to_k.lora_A" in name else value for name, value in state.items()},
        tmp_path / "w.safetensors",
    )
    assert (
        "attn1.to_k takes 64, the U-Net has 32" in wrong(pipeline, [Lora(style, 0.1), Lora(tmp_path / "w.safetensors")]).allowed
    )
    save_file(state | {"unet.time_embedding.extra": torch.ones(2)}, tmp_path / "extra.safetensors")
    assert "unet.time_embedding.extra is no part" in wrong(pipeline, [Lora(tmp_path / "extra.safetensors")]).allowed
    second = {name.replace("text_encoder", "text_encoder_2"): value for name, value in state.items()}
    save_file(second, tmp_path / "2.safetensors")
    assert "'text_encoder_2'" in wrong(pipeline, [Lora(tmp_path / "2.safetensors")]).allowed


def test_wrong_requests_name_the_field(pipeline: OneStepPipeline, style: Path, tmp_path: Path) -> None:
    assert wrong(pipeline, [Lora(style, float("nan"))]).field == "loras[0].scale"
    assert wrong(pipeline, [Lora(style), Lora(style, 11)]).field == "loras[1].scale"
    assert wrong(pipeline, [Lora(style)] * 5).field == "loras"
    assert wrong(pipeline, [Lora(style), Lora(style, 0.5)]).field == "loras[1].name"
    assert wrong(pipeline, [Lora("No Such")]).field == "loras[0].name"
    assert wrong(pipeline, [Lora(tmp_path / "none")]).field == "loras[0].name"
    with pytest.raises(NotFound, match="no-such") as missing:
        pipeline(PROMPT, loras=[Lora("no-such")])
    assert missing.value.field == "loras[0].name"


def test_files_that_are_no_loras_are_refused(style: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "lora.bin"
    pickled.write_bytes(pickle.dumps({"unet.to_q.lora_A.weight": [1.0]}))
    disguised = tmp_path / "lora.safetensors"
    disguised.write_bytes(pickled.read_bytes())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((style / FILE).read_bytes()[:-9])
    others = tmp_path / "others.safetensors"
    save_file({"conv_in.weight": torch.ones(2, 2)}, others)
    infinite = tmp_path / "infinite.safetensors"
    save_file({"unet.a.lora_A.weight": torch.full((1, 2), float("nan")), "unet.a.lora_B.weight": torch.ones(2, 1)}, infinite)
    high = tmp_path / "high.safetensors"
    save_file({"unet.a.lora_A.weight": torch.ones(600, 2), "unet.a.lora_B.weight": torch.ones(2, 600)}, high)
    (tmp_path / "ia3").mkdir()
    (tmp_path / "ia3/adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    shutil.copy(others, tmp_path / "ia3/adapter_model.safetensors")
    allowed = {
        pickled: "can run code", disguised: "diffusers reads", cut: "diffusers reads", others: "no tensor of one", high: "rank 1 to 512",
        infinite: "infinite or none",
        tmp_path / "ia3": "IA3", tmp_path: "or a folder with",
    }  # fmt: skip
    for path, words in allowed.items():
        with pytest.raises(InvalidRequest, match=words):
            files.read(path)
    with pytest.raises(InvalidRequest, match="at most 1000 bytes"):
        files.read(style, most=1000)
