"""The page and report.md of a whole made-up study; what only a browser can tell is asked of Chromium."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from gsae.report.run import run_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory, make_study):
    return run_report([make_study(tmp_path_factory.mktemp("study"), ["resid.2", "resid.15"], 22)], None)


@pytest.fixture(scope="module")
def html(page):
    return page.read_text()


@pytest.fixture(scope="module")
def markdown(page):
    return (page.parent / "report.md").read_text()


VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Open elements are closed in order, and ids are unique."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_its_ids_are_unique(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


def test_the_page_needs_nothing_from_outside(html):
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", html)
    assert not re.search(r"url\((?!#)|@import", html)


def test_what_was_run_stands_at_the_top(html):
    top = html[: html.index('id="quality"')]
    for text in (
        "Sparse autoencoders on smollm2",
        "22 runs at 2 sites",
        "mediawiki",
        "23,808 tokens",
        "22 documents",
        "within these documents",
    ):
        assert text in top


@pytest.mark.parametrize(
    "text", ["L0 0.62 over the last 50 steps is under 1", "fewer than train.resampling.min_interval_rows", "no feature was dead"]
)
def test_stopped_runs_and_events_give_their_reasons(html, markdown, text):
    assert text in html
    assert text in markdown


def test_every_event_shows_the_dead_before_and_its_outcome(html, markdown):
    words = re.sub(r"[ \n]+", " ", re.sub(r"<[^>]*>", " ", html))
    assert "184 of 2,304 in 60\u2009k rows" in words
    assert "171 of 184 on again by 105\u2009k rows" in words
    assert "171 of 184 on again by 105\u2009k rows" in markdown


def test_each_site_has_its_table_in_the_markdown(markdown):
    for site in ("resid.2", "resid.15"):
        section = markdown[markdown.index(f"\n## {site}\n") :].split("\n## ")[1]
        assert section.count("| gated") == 8  # 3 gated, 2 resampled, 2 gated-no-aux, 1 gated-norm-weighted
        assert "unfinished, not evaluated" in section
    header, rule, *rows = [line for line in markdown.splitlines() if line.startswith("|")][:13]
    assert header.startswith("| run | λ | L0 |")
    assert {line.count("|") for line in (header, rule, *rows)} == {12}


FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=2000",
    "--window-size=500,900",
]


@pytest.fixture
def dump_dom(page, tmp_path):
    """What Chromium makes of the page in a narrow window, with one script before the page and one after it."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")

    def dump(after: str, before: str = "") -> str:
        changed = tmp_path / "page.html"
        text = page.read_text().replace("<head>", f"<head><script>{before}</script>")
        changed.write_text(text.replace("</body>", f"<script>{after}</script></body>"))
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", changed.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    return dump


@pytest.mark.browser
def test_a_click_on_a_heading_sorts_and_missing_numbers_stay_last(dump_dom):
    dom = dump_dom("""
        const table = document.querySelector("#resid\\\\.15 table");
        const heads = [...table.tHead.rows[0].cells];
        const shown = [];
        for (const name of ["L0", "L0", "loss recovered", "loss recovered"]) {
            const head = heads.find((head) => head.textContent.trim() === name);
            head.querySelector("button").click();
            const column = heads.indexOf(head);
            const texts = [...table.tBodies[0].rows].map((row) => row.cells[column].firstChild.textContent.trim());
            const direction = heads.map((head) => head.getAttribute("aria-sort") ?? "").join("");
            shown.push([direction, texts.length, texts[0], texts[1], texts.at(-1)].join(" "));
        }
        heads[0].querySelector("button").click();
        shown.push(table.tBodies[0].rows[0].cells[0].querySelector(".name").textContent);
        document.title = shown.join("; ");
    """)
    assert re.search(r"<title>(.*?)</title>", dom).group(1).split("; ") == [
        "ascending 11 0.62 19.8 71.0",
        "descending 11 71.0 68.2 0.62",
        "ascending 11 0.7828 0.9460 \u2013",
        "descending 11 0.9742 0.9738 \u2013",
        "relu-m2304-l0.1-s0",
    ]


@pytest.mark.browser
def test_the_page_runs_without_errors_and_asks_for_nothing_and_fits_a_narrow_window(dump_dom):
    watch = """
        window.complaints = [];
        addEventListener("error", (event) => complaints.push("error " + event.message), true);
        document.addEventListener("securitypolicyviolation", (event) => complaints.push("asks for " + event.blockedURI));
    """
    dom = dump_dom(
        before=watch,
        after="""
        addEventListener("load", () => setTimeout(() => {
            complaints.push(...performance.getEntriesByType("resource").map((entry) => "asks for " + entry.name));
            const excess = document.documentElement.scrollWidth - innerWidth;
            if (excess > 0) complaints.push("is too wide by " + excess);
            document.title = "complaints: " + (complaints.join("; ") || "none");
        }, 200));
    """,
    )
    assert re.search(r"<title>(.*?)</title>", dom).group(1) == "complaints: none"
