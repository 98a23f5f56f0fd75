"""What names of LoRAs mean to a gateway: settled once, kept for a moment, and kept on while the store is away."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxs.errors import InvalidRequest, NotFound, SdxsError, Unavailable
from sdxs.lora import published
from sdxs.lora.manifest import LoraManifest
from sdxs.store import FileStore
from sdxs.v1 import gateway_pb2, lora_pb2
from services.fabric.deadline import Deadline
from services.fabric.models import ServedModel
from services.gateway import checks
from services.gateway.chain import Loras
from services.gateway.loras import LoraNames


class Site:
    """A store that can be away, and how often it was opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FileStore(folder / "store")

    def put(self, name: str, **facts: object) -> str:
        """Digest of a LoRA that was published under the name."""
        file = self.folder / "file"
        file.write_bytes(b"weights")
        entry = {"sha256": "0" * 64, "size": 7}
        about = {"name": name, "model": "tiny", "rank": 2, "networks": {"unet": 3}, "file": entry, **facts}
        manifest = LoraManifest.model_validate(about)
        published.put(manifest, file, self.store)
        return published.promote(name, "prod", manifest.digest, self.store)

    def names(self, fresh_s: float = 60.0) -> LoraNames:
        return LoraNames(lambda: self.store, fresh_s)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def asked(*names: str, scale: float | None = None) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(prompt="a", loras=[lora_pb2.Lora(name=name, scale=scale) for name in names])


async def settled(names: LoraNames, *asking: str, scale: float | None = None) -> list[tuple[str, float]]:
    found = await names.settled(asked(*asking, scale=scale), Deadline.after(5))
    return [(each.name, each.scale) for each in found.loras]


async def test_names_and_digests_become_whole_digests(site: Site) -> None:
    first, second = site.put("one"), site.put("two")
    names = site.names()
    assert await settled(names, "one@prod", second[:20]) == [(first, 1.0), (second, 1.0)]
    assert await settled(names, "two", scale=0.0) == [(second, 0.0)]
    assert names.known(first).name == "one"
    untouched = asked("one")
    await names.settled(untouched, Deadline())
    assert untouched.loras[0].name == "one"


async def test_a_name_stays_for_a_moment_and_then_moves(site: Site) -> None:
    first = site.put("one")
    still, fresh = site.names(60.0), site.names(0.0)
    assert await settled(still, "one") == await settled(fresh, "one") == [(first, 1.0)]
    second = site.put("one", description="newer")
    assert await settled(still, "one") == [(first, 1.0)]
    assert await settled(fresh, "one") == [(second, 1.0)]


async def test_while_the_store_is_away_what_was_known_goes_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = site.put("one")
    site.put("two")
    names = site.names(0.0)
    await settled(names, "one")

    def away(*_: object) -> tuple[bytes, str]:
        raise Unavailable("the object store does not answer")

    monkeypatch.setattr(FileStore, "get_tagged", away)
    assert await settled(names, "one") == [(digest, 1.0)]
    with pytest.raises(Unavailable):
        await settled(names, "one", "two")


@pytest.mark.parametrize(
    ("names", "scale", "kind", "field"),
    [
        (("one", "nobody"), 1.0, NotFound, "loras[1].name"),
        (("one", "one@prod"), 1.0, InvalidRequest, "loras[1].name"),
        (("one", "Two"), 1.0, InvalidRequest, "loras[1].name"),
        (("one",), float("inf"), InvalidRequest, "loras[0].scale"),
        (("a", "b", "c", "d", "e"), 1.0, InvalidRequest, "loras"),
    ],
)
async def test_wrong_ones_are_named(
    site: Site, names: tuple[str, ...], scale: float, kind: type[SdxsError], field: str
) -> None:
    site.put("one")
    with pytest.raises(kind) as error:
        await settled(site.names(), *names, scale=scale)
    assert error.value.field == field


async def test_those_of_a_model_are_listed(site: Site) -> None:
    site.put("one", trigger_words=("wet", "paint"), description="a wash")
    site.put("two", model="other")
    found = (await site.names().listing("tiny")).loras
    assert [(each.name, each.pointer, list(each.trigger_words), each.description) for each in found] == [
        ("one", "prod", ["wet", "paint"], "a wash")
    ]
    assert len((await site.names().listing("")).loras) == 2


async def test_each_stage_hears_of_those_that_change_it_and_blames_the_callers_field(site: Site) -> None:
    text = site.put("text", networks={"text_encoder": 1})
    both = site.put("both", networks={"text_encoder": 1, "unet": 1})
    none = site.put("none")
    names = site.names()
    request = await names.settled(asked("none", "text", "both"), Deadline())
    request.loras[0].scale = 0
    order = checks.order(request, {"tiny": ServedModel("tiny", "d", 32, 32, 16)}, 0, names.known)
    assert [(each.name, each.digest) for each in order.loras] == [("none", none), ("text", text), ("both", both)]
    assert [use.digest for use in Loras.of(order, ("unet",)).uses] == [both]
    encoder = Loras.of(order, ("text_encoder",))
    assert [use.digest for use in encoder.uses] == [text, both]
    error = InvalidRequest("loras[0]", "text", "a LoRA made for this model")
    encoder.rename(error)
    assert error.field == "loras[1].name" and str(error).startswith("loras[1].name: got 'text'")
