"""Teachers that a run goes on without (`on_teacher_loss: drop`), from its records: what to say, and how much it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class TeacherLosses:
    """Watches the step records of a run."""

    def __init__(self, teachers: Sequence[str]) -> None:
        self._lost: dict[str, bool] = dict.fromkeys(teachers, False)
        self._dropped: dict[str, dict[int, int]] = {}

    @property
    def dropped_tokens(self) -> dict[str, int]:
        """Target tokens that were fused without a teacher, by teacher, in all steps that were shown."""
        return {name: total for name, steps in self._dropped.items() if (total := sum(steps.values()))}

    def notes(self, record: Mapping[str, Any]) -> list[str]:
        """What a person should hear of this record: losses and returns, not each step of a loss."""
        if record["event"] == "start":
            self._forget_after(record["step"])
        if record["event"] != "step" or not self._lost:
            return []
        step, said = record["step"], []
        were_all_lost = all(self._lost.values())
        for name, was_lost in self._lost.items():
            dropped = int(record.get(f"teacher/{name}/dropped_tokens", 0))
            self._dropped.setdefault(name, {})[step] = dropped
            if dropped and not was_lost:
                said.append(
                    f"step {step}: teacher {name} is LOST; {dropped} tokens of this step go on without it "
                    "(stream.on_teacher_loss=drop)"
                )
            elif was_lost and not dropped:
                tokens = self.dropped_tokens.get(name, 0)
                said.append(f"step {step}: teacher {name} is back; {tokens} tokens went without it")
            self._lost[name] = bool(dropped)
        if all(self._lost.values()) and not were_all_lost:
            said.append(
                f"step {step}: ALL teachers are lost: tokens without any teacher are trained on CLM only"
            )
        return said

    def _forget_after(self, step: int) -> None:
        """Later steps are taken again."""
        for name, steps in self._dropped.items():
            kept = self._dropped[name] = {s: tokens for s, tokens in steps.items() if s <= step}
            self._lost[name] = bool(kept.get(step))
