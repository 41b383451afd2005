"""MediaWiki markup to plain text: good enough for language-model text, not a parser of the language."""

import html
import re
from collections.abc import Iterator

_PAGE = re.compile(r"<page>(.*?)</page>", re.DOTALL)
_TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)
_TEXT = re.compile(r"<text[^>]*>(.*?)</text>", re.DOTALL)

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<ref[^>]*/>|<ref[^>]*>.*?</ref>", re.DOTALL)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|.*?\|\}", re.DOTALL)
_MEDIA_LINK = re.compile(
    r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]",
)
_LINK = re.compile(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]")
_WEB_LINK = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
_EMPHASIS = re.compile(r"'{2,}")
_TAG = re.compile(r"<[^>]+>")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def iterate_articles(dump: str) -> Iterator[str]:
    """Yield each article of a MediaWiki XML dump as title and plain text; redirects and other pages are left out."""
    for page in _PAGE.finditer(dump):
        title, text = _TITLE.search(page[1]), _TEXT.search(page[1])
        if title is None or text is None or "<ns>0</ns>" not in page[1]:
            continue
        # Escaped twice: once as XML, once as the HTML that articles themselves may hold.
        markup = html.unescape(html.unescape(text[1]))
        if not markup.lower().startswith("#redirect"):
            yield f"{html.unescape(title[1])}\n\n{plain_text(markup)}"


def plain_text(markup: str) -> str:
    """Return the words of wiki markup: no templates, tables, references, files or tags; links keep their label."""
    text = _REFERENCE.sub("", _COMMENT.sub("", markup))
    text = _until_stable(_TEMPLATE, text)
    text = _until_stable(_MEDIA_LINK, _TABLE.sub("", text))
    text = _WEB_LINK.sub(r"\1", _LINK.sub(r"\1", text))
    text = _HEADING.sub(r"\1", _TAG.sub("", _EMPHASIS.sub("", text)))
    return _BLANK_LINES.sub("\n\n", text).strip()


def _until_stable(pattern: re.Pattern[str], text: str) -> str:
    """Remove matches, the innermost first, until there are none."""
    while True:
        text, num_removed = pattern.subn("", text)
        if not num_removed:
            return text
