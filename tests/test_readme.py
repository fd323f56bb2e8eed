"""README.md as a reader takes it: its commands and its configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from fusellm_ray.config_file import parse_config
from tests.rules_operation import parse_command

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(*languages: str) -> list[str]:
    return re.findall(rf"(?ms)^```(?:{'|'.join(languages)})\n(.*?)^```", README)


def test_every_configuration_in_the_readme_loads():
    shown = blocks("yaml")
    assert shown
    for text in shown:
        parse_config(yaml.safe_load(text))


def test_every_command_in_the_readme_is_one_of_ours():
    shell = "".join(blocks("sh", "bash")).replace("\\\n", " ")
    commands = re.findall(r"(?m)(?:^|[\s/])(fusellm-ray [^&\n]*)", shell)
    assert len(commands) > 10
    for command in commands:
        parse_command(shlex.split(command, comments=True))
