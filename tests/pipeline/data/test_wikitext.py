"""Wiki markup to plain text."""

from pipeline.data.wikitext import iterate_articles, plain_text


def page(title: str, text: str, *, namespace: int = 0) -> str:
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns><revision>"
        f'<text xml:space="preserve">{text}</text></revision></page>'
    )


def test_markup_keeps_words_and_drops_the_rest():
    markup = (
        "{{Infobox|name={{nested|{{deep}}}}}}'''Algiers''' is the [[capital city|capital]] of [[Algeria]]"
        '<ref name="a">A {{cite}} book</ref><ref name="a"/>.<!-- check -->\n'
        "[[File:Map.png|thumb|A [[map]] of it]][[Category:Cities]]\n"
        "{| class=wikitable\n| cell\n|}\n== History ==\n\n\n\nSee [http://x.org the site] <small>now</small>."
    )
    assert plain_text(markup) == "Algiers is the capital of Algeria.\n\nHistory\n\nSee the site now."


def test_articles_leave_out_redirects_and_other_namespaces():
    dump = "<mediawiki>" + "".join(
        [
            page("A &amp; B", "First &lt;b&gt;text&lt;/b&gt; &amp;amp; more"),
            page("Old", "#REDIRECT [[A]]"),
            page("Talk:A", "chatter", namespace=1),
            page("C", "Second"),
        ]
    )
    assert list(iterate_articles(dump)) == ["A & B\n\nFirst text & more", "C\n\nSecond"]
