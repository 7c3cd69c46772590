"""How a command ends."""

from collections.abc import Sequence

import pytest

from sharding.command import UserError, command


def ending(error: BaseException | None) -> int:
    @command("x.y")
    def main(arguments: Sequence[str] | None = None) -> int:  # noqa: ARG001
        if error:
            raise error
        return 0

    return main(None)


def test_a_command_that_works_returns_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(None) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [UserError("choose another --out"), OSError(28, "No space left", "/x")])
def test_an_error_of_the_user_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(error) == 2
    assert capsys.readouterr().err == f"x.y: {error}\n"


def test_a_rank_says_which_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert ending(UserError("no shards")) == 2
    assert capsys.readouterr().err == "x.y [rank 3]: no shards\n"


@pytest.mark.parametrize("error", [ValueError("bad shape"), KeyError("eta"), RuntimeError("torch")])
def test_an_error_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        ending(error)


def test_ctrl_c_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "x.y: stopped by Ctrl-C\n"
