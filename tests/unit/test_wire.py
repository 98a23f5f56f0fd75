"""Messages inside messages without decoding, and the name of what does not parse."""

import pytest

from sdxs.v1 import gateway_pb2, text_encoder_pb2, unet_pb2
from services.fabric.wire import broken_field, embed


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000])
def test_embedding_bytes_equals_serialising_the_message(size: int) -> None:
    text = text_encoder_pb2.EncodeResponse(model_digest="d" * size)
    options = unet_pb2.DenoiseRequest(seeds=[1, 2**64 - 1])
    joined = embed(unet_pb2.DenoiseRequest.TEXT_FIELD_NUMBER, text.SerializeToString()) + options.SerializeToString()
    expected = unet_pb2.DenoiseRequest(text=text, seeds=[1, 2**64 - 1])
    assert unet_pb2.DenoiseRequest.FromString(joined) == expected


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b"\x0a\x02\xff\xfe", "prompt"),  # not UTF-8
        (b"\x0a\x05ab", "prompt"),  # cut short
        (b"\x0a\x01a" + b"\x12\x01\xff", "model"),  # the second field
        (b"\x18\x01" + b"\x0a\x01\xff", "prompt"),  # a good one before it
        (b"\x0f", "request"),  # a wire type that is none
        (b"\xff" * 11, "request"),  # no tag at all
        (b"\x0a", "request"),
    ],
)
def test_the_broken_field_is_named(payload: bytes, field: str) -> None:
    assert broken_field(gateway_pb2.GenerateRequest, payload) == field
