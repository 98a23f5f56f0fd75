"""Publishing, names and downloads, in a folder and in a real S3 server."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest

from sdxs import bundle, registry
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound, PreconditionFailed
from sdxs.settings import Settings
from sdxs.store import ObjectStore, open_store, open_url


@pytest.fixture(params=["file", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """An empty store of either kind, and an empty cache."""
    values: dict[str, object] = {"store_url": f"file://{tmp_path / 'store'}"}
    if request.param == "s3":
        variables = request.getfixturevalue("s3_variables")
        place = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
        values = {name.removeprefix("SDXS_").lower(): value for name, value in variables.items()}
        values["store_url"] = f"s3://sdxs/registry-{place}"
    return Settings.model_validate({**values, "cache_dir": tmp_path / "cache"})


@pytest.fixture
def store(settings: Settings) -> ObjectStore:
    return open_store(settings, "models")


@pytest.fixture
def versions(tiny_bundle: Path, tmp_path: Path) -> list[Path]:
    """Three bundles named tiny that differ in one small file."""
    folders = [tmp_path / f"v{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        shutil.copytree(tiny_bundle, folder)
        (folder / "card.md").write_text(f"version {i}")
        bundle.seal(folder, "tiny")
    return folders


def test_a_published_bundle_opens_by_name_digest_and_abbreviation(
    settings: Settings, store: ObjectStore, versions: list[Path]
) -> None:
    digest = registry.publish(versions[0], store).digest
    with pytest.raises(NotFound, match="'tiny' is not known"):
        registry.open_model("tiny", settings)
    assert registry.promote("tiny", digest[:19], store) == digest
    for reference in ("tiny", "tiny@prod", digest, digest[:19]):
        folder, manifest = registry.open_model(reference, settings)
        assert manifest.digest == digest
        assert (folder / "card.md").read_text() == "version 0"


def test_names_move_and_roll_back(settings: Settings, store: ObjectStore, versions: list[Path]) -> None:
    first, second, third = (registry.publish(folder, store).digest for folder in versions)
    registry.promote("tiny", first, store)
    with pytest.raises(PreconditionFailed, match="no earlier"):
        registry.rollback("tiny", store)
    registry.promote("tiny", second, store)
    registry.promote("tiny", second, store)  # once more changes nothing
    registry.promote("tiny", third, store)
    assert registry.rollback("tiny", store) == second
    assert registry.rollback("tiny", store) == first
    assert registry.open_model("tiny", settings)[1].digest == first
    registry.promote("tiny", third, store)
    assert registry.rollback("tiny", store) == first  # not to what was withdrawn
    assert [(move.digest, move.withdrawn) for move in registry.history("tiny", "prod", store)] == [
        (first, False), (second, True), (third, True), (third, True),
    ]  # fmt: skip
    registry.promote("tiny", second, store, "canary")
    listed = {(entry.name, entry.pointer): entry.digest for entry in registry.listing(store) if entry.where == "store"}
    assert listed == {("tiny", "prod"): first, ("tiny", "canary"): second}


def test_racing_promotions_are_all_kept(store: ObjectStore, versions: list[Path]) -> None:
    digests = [registry.publish(folder, store).digest for folder in versions]
    threads = [threading.Thread(target=registry.promote, args=("tiny", digest, store)) for digest in digests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(move.digest for move in registry.history("tiny", "prod", store)) == sorted(digests)


def test_what_cannot_be_promoted(store: ObjectStore, versions: list[Path]) -> None:
    digest = registry.publish(versions[0], store).digest
    with pytest.raises(NotFound):
        registry.promote("tiny", "sha256:" + "0" * 64, store)
    with pytest.raises(InvalidRequest, match="a bundle named 'other'"):
        registry.promote("other", digest, store)
    with pytest.raises(InvalidRequest, match="digest"):
        registry.promote("tiny", "sha256:12", store)


def test_without_its_manifest_a_bundle_does_not_exist(settings: Settings, store: ObjectStore, versions: list[Path]) -> None:
    manifest = registry.publish(versions[0], store)
    store.delete(f"bundles/{manifest.digest.removeprefix('sha256:')}/bundle.json")
    with pytest.raises(NotFound):
        registry.open_model(manifest.digest, settings)
    registry.publish(versions[0], store)  # an upload that broke off is completed
    assert registry.open_model(manifest.digest, settings)[1] == manifest


def test_changed_files_are_not_published(store: ObjectStore, versions: list[Path]) -> None:
    (versions[0] / "card.md").write_text("changed")
    with pytest.raises(CorruptArtifact, match=r"card\.md"):
        registry.publish(versions[0], store)
    assert list(store.list("")) == []


def test_a_store_that_lies_is_found_out(settings: Settings, store: ObjectStore, versions: list[Path]) -> None:
    manifest = registry.publish(versions[0], store)
    prefix = f"bundles/{manifest.digest.removeprefix('sha256:')}"
    store.put_bytes(f"{prefix}/card.md", b"version X")  # a proper object, but not the sealed one
    with pytest.raises(CorruptArtifact, match=r"card\.md"):
        registry.open_model(manifest.digest, settings)
    other = json.loads((versions[0] / "bundle.json").read_text()) | {"recipe_hash": "other"}
    store.put_bytes(f"{prefix}/bundle.json", json.dumps(other).encode())
    with pytest.raises(CorruptArtifact, match=r"bundle\.json"):
        registry.open_model(manifest.digest, settings)
    assert list((settings.cache_dir / "bundles").iterdir()) == []


def test_a_damaged_cache_is_fetched_again(settings: Settings, store: ObjectStore, versions: list[Path]) -> None:
    digest = registry.publish(versions[0], store).digest
    folder, _ = registry.open_model(digest, settings)
    (folder / "card.md").write_text("damaged")
    folder, _ = registry.open_model(digest, settings)
    assert (folder / "card.md").read_text() == "version 0"


def test_a_bundle_by_its_s3_address(s3_variables: dict[str, str], versions: list[Path], tmp_path: Path) -> None:
    values = {name.removeprefix("SDXS_").lower(): value for name, value in s3_variables.items()}
    settings = Settings.model_validate({**values, "cache_dir": tmp_path / "cache", "store_url": f"file://{tmp_path}"})
    store = open_url("s3://sdxs/some/place", Settings.model_validate(values))
    manifest = bundle.read(versions[1])
    for name in [*manifest.files, "bundle.json"]:
        store.put_file(name, versions[1] / name)
    assert registry.open_model("s3://sdxs/some/place", settings)[1] == manifest
    with pytest.raises(NotFound):
        registry.open_model("s3://sdxs/nothing/here", settings)


@pytest.mark.parametrize("reference", ["Emoji", "a b", "x@", "@prod", "sha256:zz", "sha256:12", "", "a\n"])
def test_references_that_are_none(reference: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="model"):
        registry.open_model(reference, Settings(store_url=f"file://{tmp_path}", cache_dir=tmp_path))


def test_folders(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = Settings(store_url=f"file://{tmp_path}", cache_dir=tmp_path)
    sealed = bundle.read(tiny_bundle)
    assert registry.open_model(str(tiny_bundle), settings) == (tiny_bundle, sealed)
    assert registry.open_model(tiny_bundle.as_uri(), settings) == (tiny_bundle, sealed)
    with pytest.raises(NotFound, match="nowhere"):
        registry.open_model("./nowhere", settings)
    plain = tmp_path / "My SDXS!"
    shutil.copytree(tiny_bundle, plain)
    (plain / "bundle.json").unlink()
    (plain / "legacy.bin").write_bytes(b"pickle")
    (plain / ".gitattributes").write_text("")
    manifest = registry.open_model(str(plain), settings)[1]
    assert manifest.name == "my-sdxs-"
    assert manifest.files == sealed.files
    assert manifest.one_step == sealed.one_step


def test_a_folder_named_like_a_model_stays_a_folder(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(store_url=f"file://{tmp_path}", cache_dir=tmp_path)
    shutil.copytree(tiny_bundle, tmp_path / "emoji")
    monkeypatch.chdir(tmp_path)
    for reference in ("./emoji", Path("emoji"), Path("./emoji")):
        folder, manifest = registry.open_model(reference, settings)
        assert (folder, manifest.name) == (tmp_path / "emoji", "tiny")
        assert registry.open_model(str(folder), settings)[1].name == "tiny", "as a replica opens it again"
    assert registry.open_model("emoji", settings)[1].name == "emoji"
