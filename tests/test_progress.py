"""Progress: what is said is shown as it is, a bar on a terminal, plain lines elsewhere."""

import io

import pytest

from rlaif import progress as module
from rlaif.progress import Progress, Task


def test_text_is_printed_as_it_is_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().say("[bold]a[/bold] :smile: [3/4] \x1b[31mred\x07\tend \\[x] " + "long " * 60)
    assert capsys.readouterr().err == "[bold]a[/bold] :smile: [3/4] [31mred    end \\[x] " + "long " * 60 + "\n"


def test_quiet_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Progress(quiet=True)
    quiet.say("something")
    with quiet.task("work", 2) as task:
        task.advance()
    assert capsys.readouterr() == ("", "")


def test_a_line_now_and_then_tells_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    plain = Progress()
    with plain.task("answers", 4) as task:
        for second in (10.0, 25.0, 30.0, 46.0):
            now[0] = second
            task.advance(tokens=50, note="slow")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["  answers: 2/4  4 tokens/s  slow  about 25 s left"]
    assert (task.done, task.tokens) == (4, 200)


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stderr", terminal)
    shown = Progress()
    with shown.task("answers", 2) as outer:
        outer.advance(2, tokens=6)
        shown.say("a line [b]")
        with shown.task("inner", 1) as inner:
            inner.advance()
    assert shown.rich is None
    assert "answers" in terminal.getvalue() and "2/2" in terminal.getvalue() and "tokens/s" in terminal.getvalue()
    assert "a line [b]" in terminal.getvalue()


def test_an_interrupt_that_a_finalizer_swallowed_is_raised_at_the_next_step(monkeypatch):
    monkeypatch.setattr(Task, "interrupted", True)
    with pytest.raises(KeyboardInterrupt):
        Task(Progress(quiet=True), "steps", 3).advance()
