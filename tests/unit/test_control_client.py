"""Images that steer, from the client and the command line to the wire and the file."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
from diffusers import UNet2DConditionModel

from sdxs import Control, OneStepPipeline, bundle, cli, images
from sdxs.client import Options, request
from sdxs.errors import InvalidRequest
from sdxs.v1 import control_pb2, gateway_pb2
from tests.models import tiny_controlnet, tiny_folder

SKETCH = np.full((90, 120, 3), 255, np.uint8)
cv2.circle(SKETCH, (60, 45), 30, (0, 0, 0), 3)


def png(image_HWC: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", image_HWC[..., ::-1])[1])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the ControlNets edge and sketch, each for its type."""
    made = tiny_folder(tmp_path_factory.mktemp("bundles") / "m")
    for seed, name in enumerate(("edge", "sketch")):
        own = tiny_controlnet(UNet2DConditionModel.from_pretrained(made / "unet"), made / "controlnet" / name, seed)
        (own / "control_types.json").write_text(f'["{name}"]')
    bundle.seal(made, "steered")
    return made


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """What the commands below call S (a drawing), P (a picture) and N (not an image)."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    contents = {"S": png(SKETCH), "P": png(picture), "N": b"GIF89a"}
    for name, data in contents.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    return {name: str(tmp_path / f"{name}.png") for name in contents}


def sdxs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> int:
    """Exit code of `sdxs ARGUMENTS`, run in this process."""
    monkeypatch.setenv("SDXS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["sdxs", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_options_arrive_as_the_wires_fields() -> None:
    options: Options = {
        "controls": [Control(b"one", "sketch", scale=0.8), Control(b"two", controlnet="union", guess=True, preprocessed=True)],
        "init_image": b"start", "strength": 0.5,
    }  # fmt: skip
    sent = gateway_pb2.GenerateRequest.FromString(request("red apple", options).SerializeToString())
    one = control_pb2.Control(image=b"one", type="sketch", scale=0.8)
    two = control_pb2.Control(image=b"two", controlnet="union", scale=1.0, guess=True, preprocessed=True)
    expected = gateway_pb2.GenerateRequest(prompt="red apple", controls=[one, two], init_image=b"start", strength=0.5)
    assert sent == expected
    plain = request("red apple", {"controls": [], "seed": 0})
    assert plain == gateway_pb2.GenerateRequest(prompt="red apple", seed=0) and not plain.HasField("strength")


BAD: list[tuple[Any, str]] = [
    ({"controls": [Control(b"", "edge", scale="strong")]}, "controls[0].scale"),  # type: ignore[arg-type]
    ({"controls": [Control(b""), Control(Path("a.png"))]}, "controls[1].image"),  # type: ignore[arg-type]
    ({"controls": [Control(b"", 3)]}, "controls[0].type"),  # type: ignore[arg-type]
    ({"controls": [Control(b"", controlnet=b"\xff")]}, "controls[0].controlnet"),  # type: ignore[arg-type]
    ({"controls": [Control(b"", guess="no")]}, "controls[0].guess"),  # type: ignore[arg-type]
    ({"controls": [b"a.png"]}, "controls[0]"),
    ({"init_image": "a.png"}, "init_image"),
    ({"strength": "half"}, "strength"),
]


@pytest.mark.parametrize(("options", "field"), BAD)
def test_what_the_wire_cannot_carry_names_the_field(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request("a", options)
    assert caught.value.field == field


def test_generate_writes_the_pipelines_image(
    folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of the documentation: the same file as the library's."""
    output = tmp_path / "apple.png"
    words = ["generate", "red apple", "-o", str(output), "--model", str(folder), "--seed", "7", "--control", files["S"]]
    assert sdxs(monkeypatch, tmp_path, *words, "--control-type", "sketch", "--scale", "0.8") == 0
    pipeline = OneStepPipeline.from_bundle(folder)
    made = np.asarray(pipeline("red apple", 7, controls=[Control(png(SKETCH), "sketch", scale=0.8)])[0])
    found = {
        "prompt": "red apple", "seed": 7, "model": "steered", "digest": bundle.read(folder).digest,
        "controls": [{"type": "sketch", "controlnet": "sketch", "scale": 0.8, "image_sha256": sha256(png(SKETCH))}],
    }  # fmt: skip
    assert output.read_bytes() == images.encode(made, images.PNG, json.dumps(found))
    assert (made != np.asarray(pipeline("red apple", 7)[0])).any()


def test_every_option_of_steering(folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "apple.webp"
    words = ["generate", "a", "-o", str(output), "--model", str(folder), "--control", files["S"], "--control", files["P"]]
    words += ["--controlnet", "sketch", "--controlnet", "edge", "--scale", "0.3", "--preprocessed", "--guess"]
    assert sdxs(monkeypatch, tmp_path, *words, "--init-image", files["P"]) == 0
    drawing, picture = png(SKETCH), Path(files["P"]).read_bytes()
    controls = [
        Control(drawing, controlnet="sketch", scale=0.3, guess=True, preprocessed=True),
        Control(picture, controlnet="edge", scale=0.3, guess=True, preprocessed=True),
    ]
    made = np.asarray(OneStepPipeline.from_bundle(folder)("a", 0, 1, controls, picture, 0.6)[0])
    data = output.read_bytes()
    receipt = images.receipt_text(data)
    assert data == images.encode(made, images.WEBP, receipt)
    said = json.loads(receipt)
    assert said["controls"][1] == {
        "type": "", "controlnet": "edge", "scale": 0.3, "guess": True, "preprocessed": True, "image_sha256": sha256(picture),
    }  # fmt: skip
    assert (said["init_image_sha256"], said["strength"]) == (sha256(picture), 0.6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--control /nowhere.png --control-type edge", "control: got '/nowhere.png', allowed: a file that can be read"),
        ("--control S", "control-type: got '', allowed: one of edge, sketch, colour"),
        ("--control-type edge", "control-type: got ['edge'], allowed: one, or one for each of the 0 --control"),
        ("--scale 0.5", "scale: got [0.5]"),
        ("--control S --control P --control-type edge --scale 1 --scale 1 --scale 1", "scale: got [1.0, 1.0, 1.0]"),
        ("--control S --control-type edge --scale 3", "controls[0].scale: got 3.0, allowed: 0 to 2"),
        ("--control S --control-type crayon", "controls[0].type: got 'crayon', allowed: edge (edge); sketch (sketch)"),
        ("--control S --controlnet edge", "controls[0].type: got ''"),
        ("--control S --control-type edge --controlnet pose", "controls[0].controlnet: got 'pose'"),
        ("--control S --control N --control-type edge", "controls[1].image: got '6 bytes that are no such image'"),
        ("--init-image N", "init_image: got '6 bytes that are no such image'"),
        ("--init-image /nowhere.png", "init-image: got '/nowhere.png'"),
        ("--init-image P --strength 0", "strength: got 0.0, allowed: above 0, at most 1"),
        ("--strength 0.5", "strength: got 0.5, allowed: none without an init_image"),
    ],
)
def test_refusals(
    words: str, said: str, folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "made.png"
    arguments = [files.get(word, word) for word in words.split()]
    assert sdxs(monkeypatch, tmp_path, "generate", "a", "-o", str(output), "--model", str(folder), *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress of libraries that other tests imported loudly
    assert error.startswith(f"sdxs: {said}")
    assert not output.exists()


def test_a_type_that_is_not_installed_is_a_precondition(
    folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    any_type = tiny_folder(tmp_path / "any")
    tiny_controlnet(UNet2DConditionModel.from_pretrained(any_type / "unet"), any_type / "controlnet", 0)
    words = ["generate", "a", "-o", str(tmp_path / "a.png"), "--model", str(any_type), "--control", files["P"]]
    assert sdxs(monkeypatch, tmp_path, *words, "--control-type", "depth") == 5
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "sdxs: type 'depth' needs controlnet-aux: pip install \"sdxs[annotators]\""


def test_a_receipt_is_the_same_from_either_side() -> None:
    """float32 on the wire, what the caller wrote in the receipt."""
    control = Control(b"one", "edge", "union", 0.8, guess=True)
    message = control_pb2.Control(image=b"one", type="edge", controlnet="union", scale=0.8, guess=True)
    wire = gateway_pb2.GenerateRequest(strength=0.35)
    ours = images.steering([control], b"two", 0.35)
    assert images.steering([message], b"two", wire.strength) == ours
    assert ours == {
        "controls": [{"type": "edge", "controlnet": "union", "scale": 0.8, "guess": True, "image_sha256": sha256(b"one")}],
        "init_image_sha256": sha256(b"two"), "strength": 0.35,
    }  # fmt: skip
    assert images.steering([], b"", 1.0) == {}
    assert json.loads(images.receipt("a", 1, "m", "d", {})) == {"prompt": "a", "seed": 1, "model": "m", "digest": "d"}


@pytest.mark.parametrize("kind", [images.PNG, images.JPEG, images.WEBP])
def test_the_longest_receipt_fits_its_file(kind: int) -> None:
    """A prompt of 4096 characters, four controls and an init image."""
    controls = [Control(bytes([i]), "edge", "x" * 64, 0.123456, guess=True, preprocessed=True) for i in range(4)]
    text = images.receipt("🍎" * 4096, 2**64 - 1, "m" * 64, "sha256:" + "0" * 64, images.steering(controls, b"two", 0.5))
    data = images.encode(SKETCH, kind, text)
    assert images.receipt_text(data) == text
    assert PIL.Image.open(io.BytesIO(data)).size == (120, 90)
