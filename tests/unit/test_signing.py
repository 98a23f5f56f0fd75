"""Signatures against Amazon's own example, and against the SDK's."""

from datetime import UTC, datetime, timedelta

from minio import Minio
from pydantic import SecretStr

from sdxs.store.signing import Signer

AT = datetime(2013, 5, 24, tzinfo=UTC)
SIGNER = Signer("AKIAIOSFODNN7EXAMPLE", SecretStr("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"), "us-east-1")


def test_amazons_example() -> None:
    url = SIGNER.sign("GET", "https://examplebucket.s3.amazonaws.com/test.txt", timedelta(days=1), at=AT)
    assert url == (
        "https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256"
        "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Date=20130524T000000Z"
        "&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
        "&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
    )


def test_the_sdk_signs_alike() -> None:
    secret = SIGNER.secret_key.get_secret_value()
    sdk = Minio("localhost:9000", SIGNER.access_key, secret, secure=False, region="us-east-1")
    plain = Minio("localhost:9000", secure=False, region="us-east-1")
    for key in ("a/b.png", "a b/ü+&=.png"):
        theirs = sdk.get_presigned_url("PUT", "bucket", key, timedelta(minutes=5), request_date=AT)
        ours = SIGNER.sign("PUT", plain.get_presigned_url("PUT", "bucket", key), timedelta(minutes=5), at=AT)
        assert ours == theirs
