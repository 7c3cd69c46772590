import threading

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sharding.command import UserError
from tests.census import wait_until
from train.processes import failure


def test_who_fails_ends_only_after_all_have_said_why_they_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends the others as soon as one has ended, and what they had to say would be lost."""
    monkeypatch.setattr(failure, "_PATIENCE", 10**6)
    store, order = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), []

    def fail() -> None:
        with pytest.raises(SystemExit, match="2"), failure.Failures("train", store, 1, size=2).watched():
            raise UserError("broken")
        order.append("ended")

    thread = threading.Thread(target=fail)
    thread.start()
    wait_until(lambda: store.check(["parallax/failure"]))
    order.append("rank 0 has spoken")
    store.add("parallax/said", 1)
    thread.join()
    assert order == ["rank 0 has spoken", "ended"]
    assert "train: broken" in capsys.readouterr().err
