"""Errors, settings, and what importing the library brings in."""

from __future__ import annotations

import pickle
import subprocess
import sys

import grpc
import pytest

from sdxs import errors
from sdxs.errors import InvalidRequest, SdxsError
from sdxs.settings import Settings


def tree(kind: type[SdxsError]) -> list[type[SdxsError]]:
    """A class and everything below it in its own module."""
    below = [sub for sub in kind.__subclasses__() if sub.__module__ == "sdxs.errors"]
    return [kind, *(found for sub in below for found in tree(sub))]


def test_the_drawn_tree_is_the_tree() -> None:
    lines = [line.strip(" |-`").split() for line in (errors.__doc__ or "").splitlines()[2:] if line.strip()]
    drawn = {(line[0], line[1], int(line[2])) for line in lines}
    assert drawn == {(kind.__name__, kind.code, kind.exit_code) for kind in tree(SdxsError)}


def test_codes_are_grpcs_and_exit_codes_differ() -> None:
    kinds = tree(SdxsError)
    assert len({kind.exit_code for kind in kinds}) == len({kind.code for kind in kinds}) == len(kinds)
    assert {kind.code for kind in kinds} <= {code.name for code in grpc.StatusCode}


def test_invalid_request_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(InvalidRequest("seed", -1, "0 or more")))
    assert (error.field, error.value, error.allowed, str(error)) == (
        "seed",
        -1,
        "0 or more",
        "seed: got -1, allowed: 0 or more",
    )


def test_long_values_are_cut() -> None:
    assert len(str(InvalidRequest("prompt", "x" * 10_000, "less"))) < 150


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXS_S3_SECRET_KEY", "hush")
    monkeypatch.setenv("SDXS_TORCH_THREADS", "3")
    settings = Settings(store_url="s3://models")
    assert settings.torch_threads == 3
    assert "hush" not in repr(settings)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_a_wrong_setting_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXS_TORCH_THREADS", "many")
    with pytest.raises(InvalidRequest, match="SDXS_TORCH_THREADS: got 'many'"):
        Settings()


@pytest.mark.parametrize("url", ["localhost:8333", "s3://bucket", "http://", "http://host/path", "http://user@host"])
def test_a_public_url_that_cannot_be_signed_for_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="SDXS_S3_PUBLIC_URL"):
        Settings(s3_public_url=url)


CLIENT_ONLY = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ray", "diffusers", "transformers", "safetensors", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import sdxs
assert "grpc" not in sys.modules and "numpy" not in sys.modules, "import sdxs is light"
sdxs.Client("127.0.0.1:1").close()
sdxs.AsyncClient, sdxs.Settings()
import sdxs.registry, sdxs.store, sdxs.images, sdxs.noise, sdxs.tensors, sdxs.cli, sdxs.cli.models, sdxs.cli.generate
sdxs.registry.packaged()
try:
    sdxs.OneStepPipeline
except ModuleNotFoundError as error:
    assert error.name == "torch"
else:
    raise AssertionError("the pipeline needs torch")
"""


def test_the_client_needs_no_torch_and_no_ray() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", CLIENT_ONLY], check=True, timeout=60)


def test_unknown_attributes() -> None:
    import sdxs

    with pytest.raises(AttributeError, match="nonsense"):
        sdxs.nonsense  # noqa: B018
    assert [name for name in sdxs.__all__ if not hasattr(sdxs, name)] == []
