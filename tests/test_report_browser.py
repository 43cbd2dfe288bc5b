"""The report in headless Chromium: nothing on the console, every plot drawn, figures those of results.json, at any size."""

import json
import shutil

import pytest
from test_report import EVIL, RUNS, resolve, results, with_attacks  # noqa: F401  fixtures

from rmft_jax.report.html import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'rmft-jax[test]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: install chromium")

# A text's contrast with the page behind it, as WCAG 2 reckons it.
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  const light = (text) => { const [r, g, b] = rgb(text); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const all = [...document.querySelectorAll("p, th, td, a, summary, dt, dd, button, text, li")];
  return all.filter((one) => one.textContent.trim())
    .map((one) => { const style = getComputedStyle(one), ink = light(one.closest("svg") ? style.fill : style.color);
      return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); });
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, with_attacks, tmp_path):  # noqa: F811
    """Return a function that opens the report; at the end, the console must be empty and nothing else asked for."""
    for slot, run in enumerate(RUNS):
        with_attacks["runs"][run]["memorization"] = {"epoch": [1, 2, 3], "m": {"all": [0.1, 0.2 + slot / 10, None]}}
        with_attacks["runs"][run]["mean"] = {"all": {"ter": 4.5 - slot, "ter_ci": [3.5 - slot, 5.0]}}
    path = write_report(with_attacks, tmp_path / "report.html")
    said, asked, pages = [], [], []

    def go(**options):
        page = browser.new_page(**options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert said == [] and set(asked) == {path.as_uri()}


def test_every_plot_is_drawn_and_figures_are_those_of_the_results(visit, with_attacks):  # noqa: F811
    page = visit(viewport={"width": 1280, "height": 900})
    drawn = page.eval_on_selector_all("figure svg.chart", """charts => charts.map(chart => ({
      key: chart.closest("figure").id, width: chart.getBoundingClientRect().width,
      lines: [...chart.querySelectorAll(".line")].map(line => line.getTotalLength()),
      outside: [...chart.querySelectorAll("circle")].filter(point => {
        const a = point.getBoundingClientRect(), b = chart.getBoundingClientRect();
        return a.left < b.left || a.right > b.right || a.top < b.top - 5 || a.bottom > b.bottom; }).length,
      points: chart.querySelectorAll("circle").length}))""")  # fmt: skip
    keys = ["ter", "ser", "tegr", "perplexity", "maxter", "pareto", "occurrences", "exposure", "memorized"]
    assert [chart["key"] for chart in drawn] == [f"plot-{key}" for key in keys]
    for chart in drawn:
        assert chart["width"] > 300 and chart["points"] >= 3 and not chart["outside"], chart["key"]
        assert chart["key"] == "plot-pareto" or max(chart["lines"]) > 50, chart["key"]
    figures = page.eval_on_selector_all("[data-path]", "all => all.map(one => [one.dataset.path, one.dataset.value])")
    assert len(figures) > 500
    for path, value in figures:
        assert json.loads(value) == resolve(with_attacks, path), path


def test_definitions_are_one_click_away(visit):
    page = visit()
    for figure in page.query_selector_all("figure"):
        link = figure.query_selector(".links a")
        target = page.locator(link.get_attribute("href"))
        link.click()
        assert target.get_attribute("open") is not None
        assert target.locator(".formula, p").first.is_visible() and "rmft" in target.locator(".made").inner_text()
    page.locator("#summary thead a", has_text="AURC").click()
    assert page.locator("#def-aurc .formula").is_visible() and page.url.endswith("#def-aurc")


def test_arrow_keys_read_points_and_the_legend_hides_runs(visit):
    page = visit()
    figure = page.locator("#plot-ser")
    said = figure.locator(".said")
    figure.locator("svg.chart").focus()
    texts = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        texts.append(said.inner_text())
    assert texts[0].startswith("baseline, epoch 2.05: ") and texts[1].startswith("baseline, epoch 4.10: ")
    assert texts[2].startswith("rmft.p0.5, epoch 4.10") and texts[3].startswith("rmft.p0.5, epoch 2.05")
    assert texts[4] == texts[3]
    assert texts[5] == texts[0] and figure.locator("circle.at").count() == 1
    button = figure.get_by_role("button", name="baseline")
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false" and not figure.locator("g.run circle").last.is_visible()
    figure.locator("svg.chart").focus()
    page.keyboard.press("ArrowRight")
    assert said.inner_text().startswith("rmft.p0.5")
    button.press("Enter")
    point = figure.locator('circle[data-path="runs.baseline.checkpoints.2.prompts.all.ser"]')
    box = point.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    assert said.inner_text() == point.locator("title").text_content()


@pytest.mark.parametrize("size", [(390, 844), (768, 1024), (1280, 900)])
def test_no_page_is_wider_than_its_screen(visit, size):
    page = visit(viewport={"width": size[0], "height": size[1]})
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    regions = page.locator(".scroll")
    assert all(regions.nth(n).get_attribute("aria-label") or regions.nth(n).get_attribute("aria-labelledby")
               for n in range(regions.count()))  # fmt: skip
    assert page.locator(f"text={EVIL}").count() and page.evaluate("document.querySelectorAll('main script').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(visit, scheme):
    page = visit(color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert min(page.evaluate(CONTRAST)) >= 4.5


def test_what_a_screen_reader_hears_and_what_is_printed(visit):
    page = visit()
    nameless = page.evaluate("""[...document.querySelectorAll("a, button, svg[role=img], nav, [role=region]")].filter(one =>
      !(one.textContent.trim() || one.getAttribute("aria-label") || one.getAttribute("aria-labelledby"))).length""")
    assert nameless == 0
    levels = page.eval_on_selector_all("h1, h2", "all => all.map(one => one.tagName)")
    assert levels[0] == "H1" and levels.count("H1") == 1 and page.get_attribute("html", "lang") == "en"
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator(".said").first.is_visible()
    assert page.locator("#def-ter .formula").is_visible()  # though it was not opened


def test_without_a_script_the_page_still_tells_all(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("#verdict").is_visible() and page.locator("figure svg.chart").count() == 9
    assert page.locator("#plot-ter circle title").first.text_content()
