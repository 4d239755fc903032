"""The page works in a real browser: search finds, pages open, nothing errs, phones can read it."""

import io
import shutil

import pytest
from rich.console import Console

from tokenry.compare.kind import Column, Options, Outcome, Plot, Sweep
from tokenry.compare.run import Result
from tokenry.evidence import Record
from tokenry.measure import describe_machine
from tokenry.report import build_report, print_result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def result() -> Result:
    return Result(
        kind="decoding",
        title="Decoding",
        question="Which strategy is fastest?",
        baseline="greedy",
        columns=[Column(key="speed", title="speed", unit="x", better="higher"), Column(key="size", title="size")],
        plots=[Plot(title="Speed", y="speed"), Plot(title="Both", x="size", y="speed", log_x=True)],
        options=Options(effort="demo"),
        outcome=Outcome(
            rows=[
                {"method": "greedy", "speed": 1.0, "speed_spread": 0.1, "size": 3},
                {"method": "token-recycling", "slug": "token-recycling", "speed": 1.4, "size": 30},
                {"method": "<b>odd</b>", "speed": None, "size": 1},
            ],
            sweeps=[
                Sweep(
                    title="Growth", x="tokens", y="s", points={"greedy": [(1, 1), (10, 11)]}, exponents={"greedy": 1.04}
                )
            ],
            notes=["A note."],
            examples={"Prompt": "Once & again"},
        ),
        machine=describe_machine(),
        versions={"torch": "2"},
        seconds=1.0,
    )


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    records = [
        Record(slug="ems", check="golden", id="max", passed=True, value=3e-7),
        Record(slug="ems", check="speed", id="forward", passed=False, value=0.9, sentence="slower"),
    ]
    return build_report(tmp_path_factory.mktemp("report"), [result()], records)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_headings_of_the_terminal_are_never_cut(width):
    titles = ["Text identical", "Perplexity of the new text", "Passes", "Accepted length", "Multiply-accumulates"]
    columns = [Column(key="speed", title=title, unit="tokens/pass", better="lower") for title in titles]
    console = Console(width=width, file=io.StringIO())
    print_result(result().model_copy(update={"columns": columns}), console)
    assert "…" not in console.file.getvalue()


def test_page_is_one_file_without_network(page_path):
    text = page_path.read_text("utf-8")
    assert "<b>odd</b>" not in text
    for outside in ('src="http', "src='http", "@import", "url(http", '<link rel="stylesheet"'):
        assert outside not in text
    assert [p.name for p in page_path.parent.iterdir()] == ["index.html"]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install the package chromium to run the page test")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--no-first-run",
                "--disable-sync",
            ],
        )
        yield running
        running.close()


@pytest.fixture
def page(browser, page_path):
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    errors = []
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(page_path.as_uri())
    yield opened
    opened.close()
    assert errors == []


@pytest.mark.page
@pytest.mark.parametrize(
    ("query", "slug"), [("shrink the kv cache", "ems"), ("kv cahce", "ems"), ("forecast", "itransformer")]
)
def test_search_finds_and_a_method_page_opens(page, query, slug):
    page.keyboard.press("/")
    page.keyboard.type(query)
    assert page.locator("#hits a").first.get_attribute("href") == f"#method-{slug}"
    page.keyboard.press("Enter")
    section = page.locator(f"section[data-view='method-{slug}']")
    section.wait_for(state="visible", timeout=5000)  # the view changes when the address does, a moment after the key
    assert section.locator("pre code").first.is_visible()
    assert not page.locator("section[data-view='home']").is_visible()


@pytest.mark.page
def test_search_that_finds_nothing_says_so(page):
    page.fill("#search", "zzzzqqqq")
    assert "Nothing fits" in page.locator("#hits").inner_text()


@pytest.mark.page
def test_comparison_opens_sorts_and_leads_to_the_method(page):
    page.click("a[href='#compare-decoding']")
    table = page.locator("section.open table.results")
    table.wait_for(state="visible", timeout=5000)
    first = lambda: table.locator("tbody tr").first.locator("th").inner_text()  # noqa: E731
    assert first().startswith("greedy")
    table.locator("thead button").nth(1).click()
    table.locator("thead button").nth(1).click()
    assert first().startswith("token-recycling")
    assert page.locator("section.open svg").count() == 3
    page.click("section.open a[href='#method-token-recycling']")
    page.locator("section[data-view='method-token-recycling']").wait_for(state="visible", timeout=5000)


@pytest.mark.page
def test_dark_mode_and_phone(page):
    def ground():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = ground()
    page.click("#theme")
    assert ground() != before
    page.set_viewport_size({"width": 375, "height": 740})
    for view in ("home", "compare-decoding", "method-ems"):
        page.evaluate(f"location.hash = '{view}'")
        page.wait_for_timeout(50)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 1, f"{view} is {wide} px wider than a phone"


@pytest.mark.page
def test_keyboard_reaches_everything(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('href') || document.activeElement.id"))
    assert {"search", "theme", "#compare-decoding", "#method-ems"} <= seen
