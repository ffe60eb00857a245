"""Markup. In: the raw text of an entry, wiki markup or Penn Treebank tokens. Out: plain text."""

import re

import mwparserfromhell
from mwparserfromhell.definitions import is_visible
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

_HIDDEN_NAMESPACES = frozenset(("file", "image", "media", "category"))
_HIDDEN_TAGS = frozenset(("table", "ref"))

_WIKI_REMAINS = (
    (re.compile(r"'{2,5}|__[A-Z]+__"), ""),  # bold, italics; switches such as __TOC__
    (re.compile(r"\([\s,;]+(?=\S)"), "("),  # what a template, dropped, leaves in parentheses ...
    (re.compile(r" \(\)"), ""),  # ... or leaves of them
    (re.compile(r"[ \t]+"), " "),
    (re.compile(r" ?\n ?"), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
)

_TREEBANK = (
    (re.compile(r"-LRB- ?"), "("),
    (re.compile(r" ?-RRB-"), ")"),
    (re.compile(r"-LSB- ?"), "["),
    (re.compile(r" ?-RSB-"), "]"),
    (re.compile(r"-LCB- ?"), "{"),
    (re.compile(r" ?-RCB-"), "}"),
    (re.compile(r" ?-COLON-"), ":"),
    (re.compile(r"`` ?"), '"'),
    (re.compile(r" ?''"), '"'),
    (re.compile(r" (?=(?:[.,;:!?%]|'s|'re|'ve|'ll|'d|'m|n't|')(?:\s|$))"), ""),
)


def strip_wiki_markup(markup: str) -> str:
    """The running text of an article: no templates, tables, references, files, categories, formulas or comments."""
    # Bold and italics left to the parser make it give up on tables and files around an unbalanced one, and take longer.
    code = mwparserfromhell.parse(markup, skip_style_tags=True)
    return _replace_all(_render(code), _WIKI_REMAINS).strip()


def detokenise(text: str) -> str:
    """Penn Treebank tokens as ordinary text: brackets, quotes, and no space before punctuation."""
    return _replace_all(text, _TREEBANK)


def _render(code: Wikicode) -> str:
    return "".join(_render_node(node) for node in code.nodes)


def _render_node(node: object) -> str:
    """What a reader sees of one node; a template's text is made elsewhere, so templates give nothing."""
    match node:
        case Text():
            return str(node.value)
        case HTMLEntity():
            return str(node.normalize())
        case Heading():
            return _render(node.title)
        case Wikilink():
            namespace = str(node.title).partition(":")[0].strip().lower()
            return "" if namespace in _HIDDEN_NAMESPACES else _render(node.text or node.title)
        case ExternalLink():
            if node.title is not None:
                return _render(node.title)
            return "" if node.brackets else str(node.url)
        case Tag():
            name = str(node.tag).strip().lower()
            if name == "br":
                return "\n"
            return _render(node.contents) if node.contents and name not in _HIDDEN_TAGS and is_visible(name) else ""
    return ""


def _replace_all(text: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
