"""Some of `python -m tests.chaos`."""

import pytest

from tests.chaos.__main__ import main


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_nothing_is_lost_when_parts_die_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "unet", "gateway", "worker", "redis", "--kinds", "kill"]) == 0, capsys.readouterr().out
