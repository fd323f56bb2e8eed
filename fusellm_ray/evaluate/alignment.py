"""`fusellm-ray align`: how well a teacher's distributions would reach a target, before any training.

Two tokenizers are enough for coverage and the picture of a passage; with the teacher's model the figures that
need probabilities come too: mapped and lost mass, and fidelity.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusellm_ray.alignment.project import Aligned, Aligner
from fusellm_ray.alignment.statistics import (
    Kind,
    Sequences,
    alignment_statistics,
    kind_shares,
    mass_statistics,
    position_kinds,
)
from fusellm_ray.config import AlignmentConfig, TeacherConfig
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import CorpusError
from fusellm_ray.teachers.engine import Scores, make_engine
from fusellm_ray.teachers.scoring import join_windows, windows

PIECE_CHARS = 4000
"""Characters of a text that are aligned at once."""
PASSAGE_CHARS = 400

COLOURS = {
    Kind.EXACT: "green",
    Kind.PREFIX: "cyan",
    Kind.STRADDLED: "yellow",
    Kind.ONE_HOT: "blue",
    Kind.NONE: "red",
}
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


def show_alignment(
    target: str,
    teacher: str,
    file: Path,
    *,
    config: AlignmentConfig,
    with_model: bool,
    top_k: int = 16,
    max_bytes: int = 100_000,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Measure, print the figures and the picture, and write them as JSON if asked.

    Args:
        target, teacher: folders or hub ids; of the teacher, the model too where `with_model`.
        file: UTF-8 text.

    Raises:
        CorpusError: the file cannot be read as UTF-8 text, or is empty.
        TokenizerError, ModelError: one of them cannot be loaded.
    """
    pieces = _pieces(file, max_bytes)
    settings = TeacherConfig(name="teacher", model=teacher, top_k=top_k)
    engine = make_engine(settings) if with_model else None
    teacher_tokenizer = ByteTokenizer.load(
        settings.model, vocab_size=None if engine is None else engine.vocab_size
    )
    aligner = Aligner(teacher_tokenizer, ByteTokenizer.load(target), config, top_k)
    sequences = [sequences_of(aligner, piece, is_last=piece is pieces[-1]) for piece in pieces]
    kinds = [position_kinds(aligner, s) for s in sequences]
    shares = kind_shares(kinds)
    figures: dict[str, Any] = {
        "target": target,
        "teacher": teacher,
        "bytes": sum(len(s.text) for s in sequences),
        "positions": sum(len(k) for k in kinds),
        "coverage": 1.0 - shares["none"] - shares["one_hot"],
        "shares": shares,
        "vocabulary_exact": float(aligner.map.is_exact.mean()),
        "vocabulary_mapped": float((aligner.map.whole >= 0).mean()),
    }
    if engine is not None:
        scores = asyncio.run(_score(engine, aligner, sequences, top_k))
        figures |= _measured(aligner, sequences, scores)
    _print_figures(figures)
    console = Console()
    console.print(picture(aligner, sequences[0], PASSAGE_CHARS, console.width))
    console.print(Text.assemble("boundary: ", *((f"{k.name.lower()}  ", COLOURS[k]) for k in COLOURS)))
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def picture(aligner: Aligner, sequences: Sequences, num_chars: int, width: int) -> Text:
    """A passage twice, target tokens over teacher tokens; each target token in the colour of its position.

    Both lines show the same characters in the same columns: a bar where a token of that line ends, a gap where only
    one of the other line does.
    """
    passage = sequences.text.decode()[:num_chars]
    kinds = position_kinds(aligner, sequences)
    colours = [COLOURS[Kind(k)] for k in [Kind.NONE, *kinds]]
    target_ends, teacher_ends = sequences.target_ends, sequences.teacher_ends
    both = (set(target_ends.tolist()), set(teacher_ends.tolist()))
    out, upper, lower = Text(), Text(), Text()
    byte = 0
    for char in passage:
        token = int(np.searchsorted(target_ends, byte, side="right"))
        shown = char.translate(_VISIBLE)
        upper.append(shown, colours[min(token, len(colours) - 1)])
        lower.append(shown)
        # A boundary inside a character shows at the character's end.
        inside = range(byte + 1, byte + len(char.encode()) + 1)
        byte = inside[-1]
        ends = [any(at in line for at in inside) for line in both]
        if any(ends):
            upper.append("│" if ends[0] else " ", "dim")
            lower.append("│" if ends[1] else " ", "dim")
        if upper.cell_len >= width - 3:
            out.append_text(upper).append("\n").append_text(lower).append("\n\n")
            upper, lower = Text(), Text()
    return out.append_text(upper).append("\n").append_text(lower)


def _pieces(file: Path, max_bytes: int) -> list[str]:
    try:
        with file.open("rb") as stream:
            data = stream.read(max_bytes + 1)
        # A character that the limit cuts is left out; bytes that are none are refused wherever they stand.
        text = codecs.getincrementaldecoder("utf-8")().decode(data[:max_bytes], final=len(data) <= max_bytes)
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file}: byte {error.start} is not UTF-8 ({error.reason}); convert the file"
        ) from error
    if not text:
        raise CorpusError(f"{file}: is empty; give a file with some text")
    return [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]


def sequences_of(aligner: Aligner, piece: str, *, is_last: bool) -> Sequences:
    """A text in both models' tokens; `is_last`: it ends its document."""
    target, teacher = (
        tokenizer.sequence(piece, is_last)  # type: ignore[attr-defined]
        for tokenizer in (aligner.target, aligner.teacher)
    )
    return Sequences(piece.encode(), target.ids, target.ends, teacher.ids, teacher.ends)


async def _score(engine: Any, aligner: Aligner, sequences: Sequence[Sequences], top_k: int) -> list[Scores]:
    scores = []
    try:
        for s in sequences:
            asked = windows(s.teacher_ids, engine.max_context, aligner.teacher.bos_id)
            answers = await engine.score([prompt for prompt, _ in asked], top_k) if asked else []
            kept = [new for _, new in asked]
            scores.append(join_windows(list(zip(answers, kept, strict=True)), top_k))
    finally:
        await engine.stop()
    return scores


def _measured(aligner: Aligner, sequences: Sequence[Sequences], scores: Sequence[Scores]) -> dict[str, Any]:
    aligned: list[Aligned] = [
        aligner.align(
            s.text,
            s.target_ids,
            s.target_ends,
            s.teacher_ids,
            s.teacher_ends,
            rows.top_ids,
            rows.top_logprobs,
            rows.gold_logprobs,
        )
        for s, rows in zip(sequences, scores, strict=True)
    ]
    statistics = alignment_statistics(aligner, sequences, aligned)
    ids: NDArray[np.int32] = np.concatenate([rows.top_ids for rows in scores])
    mass = mass_statistics(aligner, ids, np.concatenate([rows.top_logprobs for rows in scores]))
    return asdict(statistics) | {"fidelity": statistics.fidelity, "vocabulary_mass": asdict(mass)}


def _print_figures(figures: dict[str, Any]) -> None:
    table = Table(
        title=f"{figures['target']} ← {figures['teacher']}", title_justify="left", show_header=False
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name in ("coverage", "fidelity", "mapped_mass", "residual_mass"):
        if name in figures:
            table.add_row(name.replace("_", " "), f"{figures[name]:.4f}")
    for kind, share in figures["shares"].items():
        table.add_row(f"positions: {kind.replace('_', '-')}", f"{share:.4f}")
    for name, share in figures.get("vocabulary_mass", {}).items():
        table.add_row(f"top-k mass: {name}", f"{share:.4f}")
    table.add_row("teacher's vocabulary: exact", f"{figures['vocabulary_exact']:.4f}")
    table.add_row("teacher's vocabulary: mapped", f"{figures['vocabulary_mapped']:.4f}")
    table.add_row("target positions", f"{figures['positions']:,}")
    Console().print(table)
