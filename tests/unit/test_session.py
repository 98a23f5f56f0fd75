"""How training starts its own Ray: guarded by a token, again when Ray was too slow, and without a trace in the environment."""

from __future__ import annotations

import os
from typing import Any

import pytest

from trainer import session

SLOW = "The current node timed out during startup. This could happen because ..."


class Ray:
    """Stands for `ray`; refuses as often as it is told to."""

    def __init__(self, *refusals: str) -> None:
        self.refusals, self.started, self.stopped = list(refusals), [], 0

    started: list[dict[str, Any]]

    def init(self, **options: Any) -> None:
        if self.refusals:
            raise RuntimeError(self.refusals.pop(0))
        self.started.append({**options, "token": os.environ.get("RAY_AUTH_TOKEN"), "mode": os.environ.get("RAY_AUTH_MODE")})

    def shutdown(self) -> None:
        self.stopped += 1


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_its_own_cluster_has_a_token_that_nobody_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ray", ray := Ray())
    before = dict(os.environ)
    with session.ray_session():
        [options] = ray.started
        assert options["address"] == "local" and options["num_cpus"] >= 4
        assert len(options["token"]) == 64 and options["mode"] == "token"
    assert dict(os.environ) == before and ray.stopped == 1


def test_a_named_cluster_is_joined_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ray", ray := Ray())
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    with session.ray_session():
        assert "address" not in ray.started[0] and "num_cpus" not in ray.started[0]
        assert ray.started[0]["token"] is None


def test_a_slow_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ray", ray := Ray(SLOW, SLOW))
    with session.ray_session():
        assert len(ray.started) == 1 and ray.stopped == 2
    monkeypatch.setattr(session, "ray", Ray(SLOW, SLOW, SLOW))
    with pytest.raises(RuntimeError, match="timed out"), session.ray_session():
        pass


def test_any_other_failure_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ray", ray := Ray("no such thing", "never reached"))
    with pytest.raises(RuntimeError, match="no such thing"), session.ray_session():
        pass
    assert ray.refusals == ["never reached"]
