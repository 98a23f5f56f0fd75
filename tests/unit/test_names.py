"""Where the name of an image leads: to our inputs, to what the settings allow, and nowhere else."""

import hashlib

import pytest

from sdxs.errors import InvalidRequest
from sdxs.v1 import control_pb2, gateway_pb2
from services.gateway.names import Place, by_name, images_of, place_of

DIGEST = hashlib.sha256(b"file").hexdigest()
OURS, ALLOWED = "s3://sdxs-artifacts/here", ("shared", "photos/public")


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        (f"sdxs-input:{DIGEST}", Place(digest=DIGEST)),
        (f"s3://sdxs-artifacts/here/inputs/{DIGEST}", Place(digest=DIGEST)),
        ("s3://shared/a.png", Place(bucket="shared", key="a.png")),
        ("s3://photos/public/a/b.png", Place(bucket="photos", key="public/a/b.png")),
    ],
)
def test_names_that_lead_somewhere(uri: str, place: Place) -> None:
    assert place_of(uri, "f", OURS, ALLOWED) == place


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "a.png",
        "sdxs-input:",
        f"sdxs-input:{DIGEST[:-1]}",
        f"sdxs-input:{DIGEST.upper()}",
        f"sdxs-input:{DIGEST}/..",
        f"SDXS-INPUT:{DIGEST}",
        f"s3://sdxs-artifacts/here/results/{DIGEST}",
        f"s3://sdxs-artifacts/here/inputs/../results/{DIGEST}",
        "s3://sdxs-models/bundles/x",
        "s3://shared",
        "s3://shared/",
        "s3://shared/a/../b",
        "s3://shared//a",
        "s3://shared/./a",
        "s3://shared/a\nb",
        "s3://shared-secrets/a.png",
        "s3://photos/private/a.png",
        "s3://photos/publicity/a.png",
        "s3://photos/public",
        "s3://photos/public/../private/a.png",
        "s3://user@shared/a.png",
        "S3://shared/a.png",
    ],
)
def test_names_that_lead_nowhere(uri: str) -> None:
    with pytest.raises(InvalidRequest, match="sdxs-input:<sha256 in hexadecimal>") as caught:
        place_of(uri, "controls[0].image_uri", OURS, ALLOWED)
    assert caught.value.field == "controls[0].image_uri"


def test_without_allowed_buckets_none_is() -> None:
    with pytest.raises(InvalidRequest):
        place_of("s3://shared/a.png", "f", OURS, ())


def test_images_by_name() -> None:
    controls = [control_pb2.Control(image=b"small", type="edge"), control_pb2.Control(image=b"a larger one", scale=0.5)]
    request = gateway_pb2.GenerateRequest(prompt="p", controls=controls, init_image=b"file")
    named = by_name(request, above=5)
    assert [control.image for control in named.controls] == [b"small", b""]
    assert named.controls[1].image_uri == f"sdxs-input:{hashlib.sha256(b'a larger one').hexdigest()}"
    assert named.controls[1].scale == 0.5
    assert (named.init_image, named.init_image_uri) == (b"file", "")
    assert by_name(request, above=0).init_image_uri == f"sdxs-input:{DIGEST}"
    assert request.init_image == b"file"


@pytest.mark.parametrize("field", ["controls[1].image_uri", "init_image_uri"])
def test_an_image_comes_one_way(field: str) -> None:
    controls = [control_pb2.Control(image=b"x"), control_pb2.Control(image=b"x")]
    request = gateway_pb2.GenerateRequest(controls=controls, init_image=b"x")
    if field == "init_image_uri":
        request.init_image_uri = f"sdxs-input:{DIGEST}"
    else:
        request.controls[1].image_uri = f"sdxs-input:{DIGEST}"
    with pytest.raises(InvalidRequest) as caught:
        list(images_of(request))
    assert caught.value.field == field
