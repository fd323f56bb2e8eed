"""What a run prints where nobody watches a terminal."""

from __future__ import annotations

import json
import math
import re

import pytest

from fusellm_ray.observe.progress import _Bars, make_display

STEP = {
    "event": "step",
    "step": 3,
    "steps": 10,
    "loss": 2.5,
    "grad_norm": 1.0,
    "time/wait_share": 0.05,
    "teacher/left/win_share": 0.75,
}


def test_a_log_has_one_line_a_step_with_the_figures_that_matter(capsys: pytest.CaptureFixture[str]):
    with make_display() as display:
        display.show(STEP)
        display.note("a note")
    step, note = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 3/10  loss 2\.5000  grad 1\.00  wait 5%  wins left 75%", step)
    assert note.endswith("a note")


def test_a_terminal_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]):
    display = _Bars("training")
    display.note("[enforce fail at alloc_cpu.cpp] [/x]")
    display.teachers({"left": "starts again: [/y]"})
    note, teachers = capsys.readouterr().err.splitlines()
    assert note == "[enforce fail at alloc_cpu.cpp] [/x]"
    assert teachers == "teachers: left starts again: [/y]"


def test_structured_lines_are_objects_that_say_their_role_and_run(capsys: pytest.CaptureFixture[str]):
    with make_display("my-run", "json") as display:
        display.teachers({"left": "1/1 replicas ready"})
        display.note("a\nnote")
        display.show(STEP)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["start of teachers", "note", "step"]
    assert {(line["role"], line["run"]) for line in lines} == {("driver", "my-run")}
    assert lines[2] | STEP == lines[2]


def test_a_figure_that_is_no_number_is_null_in_structured_lines(capsys: pytest.CaptureFixture[str]):
    with make_display("my-run", "json") as display:
        display.show(STEP | {"loss": math.nan, "grad_norm": math.inf})
    line = json.loads(capsys.readouterr().err, parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"], line["time/wait_share"]) == (None, None, 0.05)
