"""A few lines of the corpus in the target's tokens over each teacher's, as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from fusellm_ray.alignment.project import Aligner
from fusellm_ray.alignment.statistics import Kind
from fusellm_ray.config import Config
from fusellm_ray.corpus.source import Corpus
from fusellm_ray.corpus.tokens import ByteTokenizer
from fusellm_ray.errors import FuseLLMError
from fusellm_ray.evaluate.alignment import COLOURS, picture, sequences_of
from fusellm_ray.models import model_facts
from fusellm_ray.plan import teacher_tokenizer

_CHARS = 240
_WIDTH = 42
"""Columns of a line: what a telephone shows."""
_EXPLANATIONS = {
    Kind.EXACT: "boundaries coincide",
    Kind.PREFIX: "the gold token is part of a teacher's token, or reaches into the next",
    Kind.STRADDLED: "the boundary lies inside a teacher's token",
    Kind.ONE_HOT: "the gold token itself, with probability 1",
    Kind.NONE: "no distribution",
}


def alignment_passages(config: Config) -> str:
    """Each domain's first text under each teacher; what cannot be reached any more is said in its place."""
    try:
        texts = dict(_texts(config))
        target = ByteTokenizer.of_model(config.target, model_facts(config.target).vocab_size)
    except FuseLLMError as error:
        return _note(f"No sample: {error}")
    legend = " · ".join(
        f'<span class="{kind.name.lower()}">{kind.name.lower().replace("_", "-")}</span>: {text}'
        for kind, text in _EXPLANATIONS.items()
    )
    explained = f"Target tokens over the teacher's; a target token has the colour of its position. {legend}."
    parts = [f'<p class="note">{explained}</p>']
    for teacher in config.active_teachers:
        try:
            _, tokenizer = teacher_tokenizer(teacher)
            aligner = Aligner(tokenizer, target, config.alignment, teacher.top_k)
        except FuseLLMError as error:
            parts.append(_note(f"{teacher.name}: {error}"))
            continue
        for domain, text in texts.items():
            passage = picture(aligner, sequences_of(aligner, text, is_last=False), _CHARS, _WIDTH)
            blocks = "".join(f"<pre>{_html(block)}</pre>" for block in passage.split("\n\n"))
            heading = html.escape(f"{teacher.name}, {domain}")
            parts.append(f'<h3>{heading}</h3><div class="passage">{blocks}</div>')
    return "\n".join(parts)


def _texts(config: Config) -> Iterator[tuple[str, str]]:
    """The beginning of one document of each source in files; a dataset might have to be downloaded first."""
    for source in config.corpus.sources:
        if source.path is not None:
            one = config.corpus.model_copy(update={"sources": [source]})
            document = next(Corpus.open(one, config.run.seed).documents(0, 1))
            yield source.name, document.text.strip()[:_CHARS]


def _html(text: Text) -> str:
    classes = {colour: kind.name.lower() for kind, colour in COLOURS.items()}
    parts = []
    for segment in text.render(Console(width=1000)):
        style = segment.style
        name = (
            "dim"
            if style and style.dim
            else classes.get(style.color.name, "")
            if style and style.color
            else ""
        )
        escaped = html.escape(segment.text)
        parts.append(f'<span class="{name}">{escaped}</span>' if name else escaped)
    return "".join(parts).strip("\n")


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'
