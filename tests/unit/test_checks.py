"""What a request's controls and init image may say."""

from typing import Any

import pytest

from sdxs.errors import InvalidRequest
from sdxs.v1 import control_pb2, gateway_pb2
from services.fabric.models import ServedModel
from services.gateway.checks import Order, images, order

IMAGE = b"an image"
LIMIT = 1000
MODELS = {
    "emoji": ServedModel("emoji", "sha256:0", 64, 64, 77, {"union": ("edge", "sketch"), "paint": ("colour",)}),
    "any": ServedModel("any", "sha256:1", 64, 64, 77, {"first": (), "second": ()}),
    "plain": ServedModel("plain", "sha256:2", 64, 64, 77),
}


def ask(*controls: control_pb2.Control, model: str = "emoji", **fields: Any) -> Order:
    request = gateway_pb2.GenerateRequest(prompt="red apple", seed=1, model=model, controls=controls, **fields)
    return order(request, MODELS, LIMIT)


def control(**fields: Any) -> control_pb2.Control:
    return control_pb2.Control(**{"image": IMAGE, "type": "edge", **fields})


def at_fault(*controls: control_pb2.Control, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        ask(*controls, **fields)
    return caught.value.field


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf"), -0.001, -1, 2.001, 1e30])
def test_a_scale_out_of_range_is_refused(scale: float) -> None:
    assert at_fault(control(), control(scale=scale)) == "controls[1].scale"


@pytest.mark.parametrize(("scale", "chosen"), [(None, 1.0), (0, 0.0), (0.5, 0.5), (2, 2.0)])
def test_a_scale_that_is_not_given_is_one_and_zero_is_zero(scale: float | None, chosen: float) -> None:
    [made] = ask(control(scale=scale)).controls
    assert made.scale == chosen


def test_at_most_four_controls() -> None:
    assert [each.controlnet for each in ask(*[control()] * 4).controls] == ["union"] * 4
    assert at_fault(*[control()] * 5) == "controls"


@pytest.mark.parametrize(
    ("model", "fields", "chosen"),
    [
        ("emoji", {"type": "edge"}, "union"),
        ("emoji", {"type": "sketch"}, "union"),
        ("emoji", {"type": "colour"}, "paint"),
        ("emoji", {"type": "colour", "controlnet": "paint"}, "paint"),
        ("emoji", {"type": "", "controlnet": "paint", "preprocessed": True}, "paint"),
        ("any", {"type": "edge"}, "first"),
        ("any", {"type": "edge", "controlnet": "second"}, "second"),
        ("any", {"type": "my own", "preprocessed": True}, "first"),
    ],
)
def test_a_type_or_a_name_picks_the_controlnet(model: str, fields: dict[str, Any], chosen: str) -> None:
    [made] = ask(control(**fields), model=model).controls
    assert (made.controlnet, made.type, made.image) == (chosen, fields["type"], IMAGE)


@pytest.mark.parametrize(
    ("model", "fields", "field"),
    [
        ("emoji", {"type": "edgy"}, "type"),
        ("emoji", {"type": "depth"}, "type"),  # has a preprocessor, but no ControlNet of this model knows it
        ("emoji", {"type": ""}, "type"),
        ("emoji", {"type": "", "preprocessed": True}, "type"),
        ("emoji", {"type": "", "controlnet": "union"}, "type"),  # what to make of the image?
        ("emoji", {"type": "colour", "controlnet": "union"}, "type"),
        ("emoji", {"controlnet": "onion"}, "controlnet"),
        ("any", {"type": "my own"}, "type"),
        ("plain", {}, "type"),
        ("plain", {"controlnet": "union"}, "controlnet"),
        ("emoji", {"image": b""}, "image"),
    ],
)
def test_what_no_controlnet_can_do_is_refused(model: str, fields: dict[str, Any], field: str) -> None:
    assert at_fault(control(**fields), model=model) == f"controls[0].{field}"


def test_a_model_without_controlnets_says_so() -> None:
    with pytest.raises(InvalidRequest, match="this model has none"):
        ask(control(), model="plain")


@pytest.mark.parametrize("strength", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    assert at_fault(init_image=IMAGE, strength=strength) == "strength"


def test_a_strength_needs_an_init_image() -> None:
    assert at_fault(strength=0.5) == "strength"
    assert at_fault(init_image=b"", strength=1) == "strength"
    assert (ask(init_image=IMAGE).strength, ask(init_image=IMAGE, strength=0.25).strength, ask().strength) == (1, 0.25, 1)


def test_images_are_counted_together() -> None:
    half = bytes(LIMIT // 2)
    assert len(images(ask(control(image=half), init_image=half))) == 2
    assert at_fault(control(image=half), control(image=half), init_image=b"x") == "controls"
    assert at_fault(control(image=half), init_image=half + b"x") == "controls"
    assert at_fault(init_image=bytes(LIMIT + 1)) == "init_image"


def test_each_image_is_called_by_its_field() -> None:
    made = ask(control(image=b"a"), control(image=b"b"), init_image=b"c")
    assert images(made) == [("controls[0].image", b"a"), ("controls[1].image", b"b"), ("init_image", b"c")]
