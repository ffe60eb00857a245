import re

import pytest

from gsae.corpus.markup import detokenise, strip_wiki_markup


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Snow''' is ''white''.", "Snow is white."),
        ("a [[river]] and [[Danube|another]]", "a river and another"),
        ("before<!-- a note\nto editors --> after", "before after"),
        ('so it is.<ref name="a/b">A [[book]], p. 3</ref> And<ref name=c /> so on.', "so it is. And so on."),
        ("one <ref>never closed", "one <ref>never closed"),
        ("{{Infobox\n| name = {{lang|de|Schnee}}\n| area = 3\n}}\nText.", "Text."),
        ('Before.\n{| class="wikitable"\n! head\n|-\n| cell {{x}}\n{|\n| inner\n|}\n|}\nAfter.', "Before.\n\nAfter."),
        ("[[File:Snow.jpg|thumb|upright=1.2|A caption with a [[link]].]]Text.", "Text."),
        ("[[ image : Snow.jpg|200px]]Text.[[Category:Weather| ]]", "Text."),
        ("see [[:Category:Weather|the category]]", "see the category"),
        ("[https://example.org the site], [https://example.org] and https://example.org", "the site, and https://example.org"),
        ("== History ==\nLong ago.", "History\nLong ago."),
        ("* one\n* two<br/>three", "one\ntwo\nthree"),
        ("10&nbsp;km &amp; H<sub>2</sub>O", "10\xa0km & H2O"),
        ("area <math>\\pi r^2</math> of", "area of"),
        ("<gallery>\nFile:A.jpg|A\n</gallery>Text.", "Text."),
        ("'''Albedo''' ({{IPAc-en|a}}) and '''Achilles''' ({{lang|grc|A}}; born 3 May)", "Albedo and Achilles (born 3 May)"),
        ("__NOTOC__\nText.\n\n\n\n\nMore.", "Text.\n\nMore."),
        ("{{only}}\n[[Category:A template]]", ""),
    ],
)
def test_wiki_markup_leaves_the_running_text(markup, text):
    assert strip_wiki_markup(markup) == text


@pytest.mark.demo
def test_nothing_but_text_is_left_of_real_articles(real_documents):
    text = "\n".join(document.text for document in real_documents)
    assert len(text) > 2_000_000
    remains = (
        r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|^[|!*]|''|</?(?:ref|br|small|td)\b|\b(?:File|Image|Category):|\d+px|\|thumb|&\w+;|__[A-Z]+__|style="
    )
    assert re.findall(remains, text, re.MULTILINE) == []


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("Ada -LRB- born 3 May 1900 -RRB- is a poet , and `` a critic '' .", 'Ada (born 3 May 1900) is a poet, and "a critic".'),
        ("Ada 's mother did n't know ; the poets ' did -COLON- 5 %", "Ada's mother didn't know; the poets' did: 5%"),
        ("a -LSB- b -RSB- and -LCB- c -RCB-", "a [b] and {c}"),
        ("the .net frame and 'tis", "the .net frame and 'tis"),
    ],
)
def test_treebank_tokens_become_ordinary_text(tokens, text):
    assert detokenise(tokens) == text
