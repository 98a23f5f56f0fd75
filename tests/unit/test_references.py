"""How models are asked for: the parts of a reference, what it says of a name, and what a server makes of several."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from sdxs import hub, registry
from sdxs.errors import InvalidRequest, NotFound
from sdxs.hub import HubId
from sdxs.references import Reference, absolute, hub_id, likely_name
from services.fabric.models import Wanted, prefix
from services.fabric.pointers import Pointer
from services.placement import AppArgs
from services.settings import ServingSettings

WHOLE = "owner/name@refs/pr/1?vae=vae_large&controlnet=owner/edge@v1&controlnet=./sketch&name=large"


def test_a_reference_is_its_text() -> None:
    found = Reference.parse(WHOLE)
    assert found == Reference("owner/name@refs/pr/1", "vae_large", ("owner/edge@v1", "./sketch"), "large")
    assert str(found) == WHOLE and str(Reference.parse("emoji@prod")) == "emoji@prod"
    assert found.changes and not Reference.parse("emoji").changes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("owner/name", HubId("owner/name")),
        ("hf://owner/Name-1.5@v2", HubId("owner/Name-1.5", "v2")),
        ("owner/name@refs/pr/1", HubId("owner/name", "refs/pr/1")),
        *((text, None) for text in ("emoji", "emoji@prod", "./name", "../name", "/owner/name", "a/b/c", "owner/", "s3://a/b", "a b/c")),
        *((text, None) for text in ("owner/name@", "sha256:" + "0" * 64, "~/name", "file:///owner/name")),
    ],
)  # fmt: skip
def test_hub_ids(text: str, found: HubId | None) -> None:
    assert HubId.parse(text) == found


def test_a_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") == HubId("owner/name")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_id("owner/name") is None
    assert hub_id("hf://owner/name") == HubId("owner/name")
    assert absolute("owner/name?controlnet=owner/other") == f"{tmp_path}/owner/name?controlnet=hf://owner/other@main"
    for text in ("emoji@prod?name=a", "sha256:" + "0" * 64, "s3://bucket/folder?vae=b"):
        assert absolute(text) == text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("emoji", "emoji"), ("emoji@canary?vae=vae_large", "emoji"), ("emoji?name=other", "other"), ("owner/SDXS 512", "sdxs-512"),
        ("hf://owner/Name@0123", "name"), ("owner/name@main?vae=b", "name"), ("/a/b/Folder", "folder"), ("s3://bucket/a/b?vae=c", "b"),
    ],
)  # fmt: skip
def test_the_name_that_a_reference_says(text: str, name: str) -> None:
    assert likely_name(text) == name
    assert prefix(Wanted(text).name) == f"sdxs-{name}-", "its applications are left alone while it cannot be found"


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["emoji@prod", "emoji?vae=vae_large"], "each name once"),
        (["emoji", "owner/name?name=emoji"], "each name once"),
        (["emoji", "owner/name?size=3"], "vae=, name="),
    ],
)
def test_several_models_need_names_of_their_own(models: list[str], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        AppArgs(models=tuple(models))


def test_the_same_model_twice_with_another_name() -> None:
    models = ("emoji", "emoji?vae=vae_large&name=emoji-large", "owner/name", "owner/name?vae=vae_large&name=large")
    assert AppArgs(models=models).references == models


def test_a_hub_that_is_away_is_asked_less_and_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at all once the model is found."""
    asked: list[str] = []

    def away(what: str, source: str) -> HubId:
        asked.append(source)
        raise NotFound("the hub cannot be reached")

    monkeypatch.setattr(hub, "pinned", away)
    pointer = Pointer("owner/name", ServingSettings(store_url=f"file://{tmp_path}", cache_dir=tmp_path))
    assert [pointer.look() for _ in range(3)] == [False] * 3
    assert asked == ["owner/name"] and "cannot be reached" in pointer.error
    assert registry.moves("emoji@prod?name=a") and not registry.moves("hf://owner/name@main")


def test_a_value_is_not_read_as_a_path() -> None:
    for vae in ("../vae", "/vae", "a/b", ".."):
        with pytest.raises(InvalidRequest, match="such as vae_large"):
            Reference.parse(f"emoji?vae={vae}")
