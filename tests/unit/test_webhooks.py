"""Signatures of webhooks, against the specification's own example and an implementation of its text; and where webhooks may lead."""

import base64
import hashlib
import hmac
import time
from typing import Any

import pytest

from sdxs import webhooks
from sdxs.errors import InvalidRequest, PermissionDenied, PreconditionFailed
from services.fabric.job_webhooks import check_url, is_public
from services.settings import ServingSettings

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"test": 2432232314}'


def test_a_known_signature() -> None:
    """The example that the specification's reference libraries test themselves with."""
    headers = webhooks.sign(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, BODY)
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def signed(**changes: str) -> dict[str, str]:
    return {**webhooks.sign(SECRET, "msg", int(time.time()), BODY), **changes}


def test_what_was_signed_is_verified() -> None:
    assert webhooks.verify(signed(), BODY, SECRET) == "msg"
    shouted = {name.title(): value for name, value in signed().items()}
    assert webhooks.verify(shouted, BODY, SECRET.removeprefix("whsec_")) == "msg"
    both = signed()["webhook-signature"]
    assert webhooks.verify(signed(**{"webhook-signature": f"v1a,xx v1,{'A' * 43}= {both}"}), BODY, SECRET) == "msg"


OTHER = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@pytest.mark.parametrize(
    ("changes", "body", "secret"),
    [
        ({}, BODY + b" ", SECRET),
        ({}, BODY, OTHER),
        ({"webhook-id": "other"}, BODY, SECRET),
        ({"webhook-id": ""}, BODY, SECRET),
        ({"webhook-timestamp": "now"}, BODY, SECRET),
        ({"webhook-timestamp": "²"}, BODY, SECRET),
        ({"webhook-timestamp": ""}, BODY, SECRET),
        ({"webhook-signature": ""}, BODY, SECRET),
        ({"webhook-signature": "v1"}, BODY, SECRET),
        ({"webhook-signature": "v1,é"}, BODY, SECRET),
        ({"webhook-signature": f"v1,{'A' * 43}="}, BODY, SECRET),
    ],
)
def test_anything_else_is_refused(changes: dict[str, str], body: bytes, secret: str) -> None:
    with pytest.raises(PermissionDenied):
        webhooks.verify(signed(**changes), body, secret)


@pytest.mark.parametrize("seconds", [-330, 330])
def test_what_is_old_or_of_the_future_is_refused(seconds: int) -> None:
    headers = webhooks.sign(SECRET, "msg", int(time.time()) + seconds, BODY)
    with pytest.raises(PermissionDenied, match="more than 300 s from now"):
        webhooks.verify(headers, BODY, SECRET)
    assert webhooks.verify(headers, BODY, SECRET, tolerance_s=400) == "msg"


def test_no_other_time_or_version_fits_the_signature() -> None:
    headers = signed()
    moved = {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)}
    for wrong in (moved, {**headers, "webhook-signature": headers["webhook-signature"].replace("v1,", "v2,")}, {}):
        with pytest.raises(PermissionDenied):
            webhooks.verify(wrong, BODY, SECRET)


def test_a_signature_is_the_mac_of_id_time_and_body() -> None:
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    mac = hmac.new(key, b"id.17." + BODY, hashlib.sha256).digest()
    assert webhooks.sign(SECRET, "id", 17, BODY)["webhook-signature"] == "v1," + base64.b64encode(mac).decode()


@pytest.mark.parametrize("secret", ["", "whsec_", "short", "whsec_" + "A" * 28, "whsec_" + "A" * 92, "whsec_ä" + "A" * 31])
def test_a_secret_has_a_length(secret: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        webhooks.key_of(secret)
    assert caught.value.field == "webhook_secret"


def test_a_wrong_secret_is_said_at_the_start_but_not_shown() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ServingSettings.model_validate({"webhook_secret": "hunter2"})
    assert caught.value.field == "SDXS_WEBHOOK_SECRET"
    assert "hunter2" not in str(caught.value)


def settings(**changes: Any) -> ServingSettings:
    return ServingSettings.model_validate({"webhook_secret": SECRET, **changes})


INSIDE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.2.1",
    "224.0.0.1", "255.255.255.255", "240.0.0.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "", "localhost",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://1.1.1.1/", "ftp://1.1.1.1/", "https://", "https:///path", "1.1.1.1", "javascript:alert(1)", "https://1.1.1.1:99999/",
        "https://127.0.0.1/", "https://localhost/", "https://[::1]/", "https://2130706433/", "https://0x7f.1/", "https://127.1/",
        "https://[::ffff:169.254.169.254]/", "https://user@1.1.1.1/", "https://1.1.1.1\\@127.0.0.1/", "https://1.1.1.1/ /",
        "https://1.1.1.1/\n", "https://1.1.1.1/" + "a" * 2048, "https://1.1.1.1/ä", "https://[::1", "https://a..b/",
    ],
)  # fmt: skip
async def test_a_webhook_that_may_not_be_names_its_field(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await check_url(url, settings())
    assert caught.value.field == "webhook_url"


async def test_a_webhook_that_may_be() -> None:
    await check_url("https://1.1.1.1/hook?a=b", settings())
    await check_url("http://1.1.1.1:8080/", settings(webhook_allow_http=True))
    await check_url("https://127.0.0.1/", settings(webhook_allow_private=True))
    with pytest.raises(InvalidRequest):
        await check_url("http://127.0.0.1/", settings(webhook_allow_private=True))


async def test_without_a_secret_there_are_no_webhooks() -> None:
    with pytest.raises(PreconditionFailed, match="SDXS_WEBHOOK_SECRET"):
        await check_url("https://1.1.1.1/", settings(webhook_secret=""))
