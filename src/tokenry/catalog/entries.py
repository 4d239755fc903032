"""A method's card: what it does, for whom, the paper, where it is, what it claims."""

from __future__ import annotations

import importlib.metadata
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from rapidfuzz import fuzz

__all__ = ["Card", "CardClaim", "Reference", "card", "cards"]

CARDS = Path(__file__).parent / "cards"
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
EntryPoint = Annotated[str, StringConstraints(pattern=r"^[a-z_][\w.]*:[A-Za-z_]\w*$")]
Sentence = Annotated[str, StringConstraints(min_length=20, max_length=600)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reference(_Strict):
    """The authors' own code. ``repository`` is empty where none was published, ``licence`` is then ``none``."""

    repository: str = ""
    commit: str = ""
    licence: str
    note: str = ""

    @property
    def may_be_run(self) -> bool:
        """Whether there is code, under a licence that lets us time it beside ours."""
        return bool(self.repository) and not self.licence.lower().startswith("no")


class CardClaim(_Strict):
    """A sentence of the paper with a number in it, or a behaviour it implies.

    Attributes:
        id: Unique within the card; the measuring function is registered under ``(slug, id)``.
        kind: ``claim`` for the paper's own numbers, ``behaviour`` for the effect on small real data.
        statement: What is claimed, in our words, with the number.
        paper: The paper's number, if there is one.
        unit: Its unit.
        source: Where in the paper, on which model and machine.
        runs: ``cpu``: measured on any machine; ``gpu``: needs a CUDA device; ``none``: cannot be measured here.
        why_not: Required unless ``runs`` is ``cpu``: what is missing.
        minutes: Expected minutes on two cores.
    """

    id: Slug
    kind: Literal["claim", "behaviour"] = "claim"
    statement: Sentence
    paper: float | None = None
    unit: str = ""
    source: str
    runs: Literal["cpu", "gpu", "none"]
    why_not: str = ""
    minutes: float = 1.0

    @model_validator(mode="after")
    def _says_why_not(self) -> CardClaim:
        if self.runs != "cpu" and not self.why_not:
            raise ValueError(f"claim {self.id!r} does not run on a CPU: say why in why_not")
        return self


class Card(_Strict):
    """One method.

    Attributes:
        slug: The method's name everywhere: card, golden folder, CLI, file name.
        title: Its name as people say it.
        does: One sentence in the words of someone who has the problem.
        use_when: When to take it.
        not_when: When to take something else.
        entry_point: ``module:attribute`` of the public face.
        models: timm model names that it registers.
        mixers: Token mixers that it registers.
        also: Further public names, as ``module:attribute``.
        compare: Kinds of ``tokenry compare`` in which it stands.
        snippet: Code that runs as it is (a test runs it).
    """

    slug: Slug
    title: str
    authors: list[str] = Field(min_length=1)
    year: int = Field(ge=1990, le=2100)
    arxiv: Annotated[str, StringConstraints(pattern=r"^(\d{4}\.\d{4,5})?$")] = ""
    paper: str
    venue: str = ""
    does: Sentence
    use_when: Sentence
    not_when: Sentence
    family: Literal[
        "tokenization", "vision", "series", "language", "moe", "kvcache", "decoding", "multimodal", "generation",
        "training", "text", "code",
    ]  # fmt: skip
    interface: Literal[
        "backbone", "mixer", "decoding", "cache", "loss", "tokenizer", "estimator", "forecaster", "language-model", "restoration",
    ]  # fmt: skip
    entry_point: EntryPoint
    models: list[str] = []
    mixers: list[str] = []
    also: list[EntryPoint] = []
    compare: list[str] = []
    tags: list[str] = Field(min_length=2)
    snippet: Annotated[str, StringConstraints(min_length=20)]
    reference: Reference
    claims: list[CardClaim] = Field(min_length=1)

    @model_validator(mode="after")
    def _claims_are_unique(self) -> Card:
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) != len(ids):
            raise ValueError(f"claim ids of {self.slug!r} are not unique: {ids}")
        return self

    @property
    def link(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    @classmethod
    def read(cls, path: Path) -> Card:
        """Read a card from a TOML file whose name is its slug."""
        try:
            found = cls.model_validate(tomllib.loads(path.read_text("utf-8")))
        except (ValidationError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{path.name} is not a valid card: {error}") from error
        if found.slug != path.stem:
            raise ValueError(f"{path.name} holds the card of {found.slug!r}: file name and slug must agree")
        return found


@cache
def cards() -> dict[str, Card]:
    """All cards by slug: Tokenry's own, then those of other packages (entry-point group ``tokenry.methods``).

    An entry point of that group is named after its slug and points to a ``Card`` or to the path of a card file.

    Raises:
        ValueError: A card is not valid, or cannot be loaded; the message names the package to repair or uninstall.
    """
    found = {path.stem: Card.read(path) for path in sorted(CARDS.glob("*.toml"))}
    for entry in importlib.metadata.entry_points(group="tokenry.methods"):
        try:
            target = entry.load()
            extra = target if isinstance(target, Card) else Card.read(Path(target))
        except Exception as error:  # code of another package: whatever goes wrong there
            raise ValueError(
                f"the entry point {entry.name} = {entry.value} (group tokenry.methods) brings no card: "
                f"{type(error).__name__}: {error}. Repair or uninstall the package {entry.dist and entry.dist.name}"
            ) from error
        if extra.slug in found:
            raise ValueError(f"{entry.value} brings a second card for {extra.slug!r}")
        found[extra.slug] = extra
    return found


def card(slug: str) -> Card:
    """The card of one method.

    Raises:
        ValueError: There is none; the message names the nearest slugs.

    Example:
        >>> card("poolformer").arxiv
        '2111.11418'
    """
    known = cards()
    if slug in known:
        return known[slug]
    raise ValueError(f"no method is called {slug!r}; {near_names(slug, list(known))}")


def near_names(name: str, known: list[str]) -> str:
    """A hint for a name that is not known: the nearest ones, capitals and underscores forgiven."""
    query, *choices = (text.lower().replace("_", "-") for text in (name, *known))
    scored = sorted(zip((fuzz.ratio(query, choice) for choice in choices), known, strict=True), reverse=True)
    near = [found for score, found in scored[:3] if score >= 60]
    return f"did you mean {', '.join(near)}?" if near else "`tokenry list` shows all methods"
