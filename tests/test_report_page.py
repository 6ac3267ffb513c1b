"""The page in a real headless Chromium: every section, filter and link; dark, narrow, on paper, followed live, and hostile."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ccpo.report import write_report
from ccpo.report.page import _asset
from ccpo.report.watch import Server
from hostile_run import write_hostile
from report_browser import chromium, needs_chromium, open_page, violations, wait_for_count
from run_files import metrics_of, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    needs_chromium()
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    runs = [write_run(folder / name, name=name, seed=seed) for seed, name in enumerate(("first", "second"))]
    worth = {"mean": 0.25, "low": 0.125, "high": 0.375}
    agents = {"thinker": {"removal": worth, "verdict": "helps"}, "<b>": {"verdict": "free-rides"}}
    (runs[0] / "free_riding.json").write_text(json.dumps({"problems": 40, "agents": agents, "untold": ["replay"]}))
    return f"file://{write_report(runs, folder / 'report.html')}"


@pytest.fixture(scope="module")
def shown(browser: Any, report: str) -> Iterator[Any]:
    page, heard = open_page(browser, report)
    yield page
    assert heard.errors == []
    assert heard.requests == [report]
    page.close()


def rollouts(page: Any) -> None:
    page.evaluate("document.getElementById('rollouts').scrollIntoView()")
    page.wait_for_selector("#rows .row")


def count(page: Any) -> int:
    return int(page.inner_text(".count").split()[0].replace(",", ""))


def reset(page: Any) -> None:
    page.click("#f-reset")
    assert count(page) == 192


def test_every_section_is_there_and_linked(shown: Any):
    names = ["Overview", "Learning", "Credit", "Team", "Rollouts", "Compare"]
    assert shown.locator("main h2").all_inner_texts() == names
    assert shown.locator("#nav a").all_inner_texts() == names
    for name in names:
        shown.click(f"#nav a:text-is('{name}')")
        box = shown.locator(f"#{name.lower()} h2").bounding_box()
        assert -5 < box["y"] < 700, name
        shown.wait_for_selector(f"#nav a[aria-current]:text-is('{name}')")
    assert shown.title() == "first · ccpo report"


def test_who_coasts_is_told_where_it_was_measured(shown: Any):
    text = shown.inner_text("#free-riding")
    for part in ("40 problems", "thinker", "0.250", "helps", "<b>", "free-rides", "Not told: replay"):
        assert part in text


def test_the_overview_tells_what_came_of_it(shown: Any):
    text = shown.inner_text("#overview")
    assert "2 agents (thinker and solver) as think_solve on sums, paid by ccpo_v1." in text
    assert "Accuracy on 500 problems of heldout went from 0.300 to 0.900 in 12 steps." in text
    for part in (
        "ccpo train sums",
        "0123abc",
        "python 3.11.0",
        "26,400",
        "team with thinker blank",
        "+0.600",
        "Warnings",
    ):
        assert part in text, part


def test_curves_have_a_legend_zoom_smoothing_and_values(shown: Any):
    charts = shown.locator("#learning .chart figcaption strong").all_inner_texts()
    assert charts[:4] == ["Accuracy on heldout", "Reward in training", "Mean credit", "Share of credit"]
    for title in ("Gate", "KL", "Entropy", "Length", "Tokens", "Seconds"):
        assert title in charts
    reward = shown.locator("#chart-reward")
    paths = reward.locator("path")
    paths.first.wait_for(state="attached")  # drawn once its size is known
    before = paths.count()
    button = reward.locator(".legend button", has_text="without thinker")
    button.click()
    assert (button.get_attribute("aria-pressed"), paths.count()) == ("false", before - 1)
    button.click()
    shown.fill("#zoom-from", "3")
    shown.press("#zoom-from", "Enter")
    shown.fill("#zoom-to", "6")
    shown.press("#zoom-to", "Enter")
    assert reward.locator("text.x").all_text_contents()[0] == "3"
    shown.click("#zoom-reset")
    box = reward.locator(".catcher").bounding_box()
    shown.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50)
    shown.mouse.down()
    shown.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 60, steps=4)
    shown.mouse.up()
    assert 5 <= int(shown.input_value("#zoom-from")) <= 7
    shown.mouse.dblclick(box["x"] + 20, box["y"] + 20)
    assert shown.input_value("#zoom-from") == ""
    plain = paths.first.get_attribute("d")
    shown.evaluate(
        "(() => { const s = document.getElementById('smooth'); s.value = 0.9; s.dispatchEvent(new Event('input')); })()"
    )
    assert paths.nth(1).get_attribute("d") != plain
    assert paths.first.get_attribute("d") == plain
    shown.evaluate(
        "(() => { const s = document.getElementById('smooth'); s.value = 0; s.dispatchEvent(new Event('input')); })()"
    )
    reward.locator(".plot").focus()
    shown.keyboard.press("End")
    assert reward.locator(".tip strong").inner_text() == "step 12"
    assert "team" in reward.locator("[role=status]").inner_text()
    reward.locator("summary").click()
    wait_for_count(reward.locator("tbody tr"), 12)
    shown.click("#any-metric summary")
    shown.select_option("#metric", "actor/solver/loss")
    assert shown.inner_text("#chart-any figcaption") == "actor/solver/loss"


def test_credit_is_shown_for_any_third(shown: Any):
    assert shown.inner_text("#credit-window table caption").startswith("all steps: 192 rollouts")
    wait_for_count(shown.locator(".boxes rect"), 4)
    everything = shown.locator(".joint .cell strong").all_inner_texts()
    assert shown.locator(".joint .cell span").all_inner_texts() == ["redundant", "helped", "hurt", "hopeless"]
    shown.click("#credit .segmented button:has-text('last third')")
    assert shown.inner_text("#credit-window table caption").startswith("last third: 64 rollouts")
    assert shown.locator(".joint .cell strong").all_inner_texts() != everything
    shown.click("#credit .segmented button:has-text('all steps')")
    lazy = shown.inner_text("#lazy")
    assert "+0.660" in lazy
    assert "its messages matter" in lazy


def test_the_team_is_drawn(shown: Any):
    wait_for_count(shown.locator(".graph .turn"), 2)
    wait_for_count(shown.locator(".graph .edge"), 2)
    flows = shown.locator(".graph .flow").all_text_contents()
    assert flows[0].endswith(" tokens")
    assert flows[1].startswith("credit ")
    shown.click("#edges summary")
    assert shown.locator("#edges tbody tr").all_inner_texts()[0].split("\t")[:2] == ["thinker", "solver"]
    shown.click("#prompts summary")
    assert "Think about: Problem" in shown.inner_text("#prompts pre")


def test_every_filter_does_what_it_says(shown: Any, report: str):
    rollouts(shown)
    reset(shown)
    table = rows_of(report)
    for outcome, wanted in (("right", sum(r[2] == 1 for r in table)), ("wrong", sum(r[2] == 0 for r in table))):
        shown.select_option("#f-outcome", outcome)
        assert count(shown) == wanted > 0
    shown.select_option("#f-outcome", "cut")
    assert count(shown) == sum(any(t[3] for t in r[4]) for r in table) > 0
    shown.select_option("#f-outcome", "none")
    assert "No rollout fits" in shown.inner_text("#browser")
    reset(shown)
    found = {}
    for effect in ("helped", "hurt", "redundant", "hopeless"):
        shown.select_option("#f-effect", effect)
        found[effect] = 0 if shown.is_visible(".none") else count(shown)
    assert sum(found.values()) == 192
    assert found["helped"] > 0
    shown.select_option("#f-effect", "helped")
    shown.select_option("#f-agent", "solver")
    assert shown.is_visible(".none")
    reset(shown)
    shown.fill("#f-from", "3")
    shown.fill("#f-to", "4")
    assert count(shown) == 32
    reset(shown)
    shown.select_option("#f-agent", "thinker")
    shown.fill("#f-low", "0.5")
    assert count(shown) == sum(r[5][0] >= 0.5 for r in table)
    shown.fill("#f-high", "0.7")
    assert count(shown) == sum(0.5 <= r[5][0] <= 0.7 for r in table)
    reset(shown)
    shown.select_option("#f-sort", "poor")
    shown.select_option("#f-agent", "thinker")
    least = min(r[5][0] for r in table)
    assert f"{abs(least):.2f}" in shown.locator("#rows .row").first.inner_text()
    reset(shown)
    shown.fill("#f-query", "PROBLEM 1")
    assert 0 < count(shown) < 192
    shown.fill("#f-query", "which leaves")
    assert shown.is_visible(".none")
    shown.select_option("#f-scope", "all")
    assert 0 < count(shown) < 192
    reset(shown)


def rows_of(report: str) -> list[list[Any]]:
    text = Path(report.removeprefix("file://")).read_text()
    return json.loads(text.split('id="rollouts-0">')[1].split("</script>")[0])["rows"]


def test_a_rollout_shows_what_was_said_and_what_without_it(shown: Any):
    rollouts(shown)
    reset(shown)
    shown.click("#row-1")
    text = shown.inner_text("#detail")
    for part in (
        "step 1 · problem 1 · rollout 2 of 4",
        "reference",
        "credit",
        "advantage",
        "reward without it",
        "Without thinker",
        "Without solver",
    ):
        assert part in text, part
    wait_for_count(shown.locator("#detail .pair"), 2)
    wait_for_count(shown.locator("#detail .pair .play"), 2)
    shown.wait_for_selector("#detail math", state="attached")
    assert shown.evaluate("location.hash") == "#rollouts/1/0/1"


def test_the_list_is_used_by_keys(shown: Any):
    rollouts(shown)
    reset(shown)
    shown.focus("#rows")
    shown.keyboard.press("Home")
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 191), ("PageUp", None), ("Home", 0)):
        shown.keyboard.press(key)
        chosen = shown.get_attribute("#rows", "aria-activedescendant")
        assert place is None or chosen == f"row-{place}"
        assert shown.is_visible(f"#{chosen}[aria-selected=true]")
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.id") == "detail"


def test_links_lead_to_the_problem_at_other_steps(shown: Any):
    rollouts(shown)
    reset(shown)
    shown.focus("#rows")
    for _ in range(192):
        shown.keyboard.press("ArrowDown")
        if shown.locator("#detail .sib:has-text('step')").count():
            break
    problem = shown.locator("#detail header > .message").inner_text()
    step = shown.locator("#detail .sib:has-text('step')").first.inner_text().split()[1]
    shown.locator("#detail .sib:has-text('step')").first.click()
    assert shown.locator("#detail header > .message").inner_text() == problem
    assert f"step {step} " in shown.inner_text("#detail .where")
    shown.locator("#detail .sib").nth(2).click()
    assert "rollout 3 of 4" in shown.inner_text("#detail .where")


def test_a_link_to_a_rollout_opens_it(browser: Any, report: str):
    page, heard = open_page(browser, f"{report}#rollouts/7/2/3")
    page.wait_for_selector("#detail .where")
    assert "step 7 · problem 3 · rollout 4 of 4" in page.inner_text("#detail")
    assert page.is_visible("#rows [aria-selected=true]")
    assert heard.errors == []
    page.close()


def test_runs_are_compared_and_chosen(browser: Any, report: str):
    page, heard = open_page(browser, report)
    page.click("#nav a:text-is('Compare')")
    text = page.inner_text("#compare")
    assert "optim.lr" in text
    assert "run.seed" in text
    wait_for_count(page.locator("#compare .chart"), 4)
    page.locator("#compare .chart").first.locator(".ends text").first.wait_for(state="attached")
    ends = page.locator("#compare .chart").first.locator(".ends text").all_text_contents()
    assert [e.split()[0] for e in sorted(ends)] == ["first", "second"]
    page.click("#compare button:has-text('by generated tokens')")
    page.locator("#compare .chart").nth(1).locator("text.x", has_text="20k").wait_for(
        state="attached"
    )  # drawn once its size is known
    page.select_option("#run", "1")
    assert page.inner_text("h1") == "second"
    rollouts(page)
    assert count(page) == 192
    assert heard.errors == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_nothing_serious_is_wrong_with_access(browser: Any, report: str, scheme: str, width: int):
    page, heard = open_page(browser, report, color_scheme=scheme, viewport={"width": width, "height": 800})
    rollouts(page)
    for box in page.locator("details").all():
        box.evaluate("d => d.open = true")
    page.wait_for_timeout(300)
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert heard.errors == []
    page.close()


def test_dark_is_chosen_by_the_system_and_by_hand(browser: Any, report: str):
    page, _ = open_page(browser, report, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    light = page.evaluate(ground)
    assert (dark, light) == ("rgb(19, 21, 24)", "rgb(247, 247, 245)")
    page.reload()
    page.wait_for_selector("#overview h2")
    assert page.evaluate(ground) == light
    page.emulate_media(media="print")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.close()


def test_it_prints(browser: Any, report: str, tmp_path: Path):
    page, heard = open_page(browser, report, color_scheme="dark")
    page.emulate_media(media="print")
    paper = page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert 3 <= paper.count(b"/Type /Page\n") <= 40
    assert not page.is_visible("#nav")
    assert page.is_visible("#compare h2")
    assert heard.errors == []
    page.close()


def test_a_hostile_run_cannot_run_or_break_anything(browser: Any, tmp_path: Path):
    path = write_report([write_hostile(tmp_path / "run")])
    page, heard = open_page(browser, f"file://{path}")
    rollouts(page)
    total = count(page)
    page.focus("#rows")
    for _ in range(total):
        page.keyboard.press("ArrowDown")
        while page.locator("#detail .link").count():
            page.locator("#detail .link").first.click()
    assert page.evaluate("window.pwned") is None
    for box in page.locator("details").all():
        box.evaluate("d => d.open = true")
    page.fill("#f-query", "<script>")
    assert count(page) >= 2
    wait_for_count(page.locator("main script, main img, main iframe, main a[href^=javascript]"), 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert "11 notes" not in page.inner_text("#learning")
    assert "leads out of the run's folder" in page.inner_text("#notes")
    assert violations(page) == []
    assert heard.errors == []
    assert heard.requests == [f"file://{path}"]
    page.close()


def test_hidden_characters_are_shown(browser: Any, tmp_path: Path):
    path = write_report([write_hostile(tmp_path / "run")])
    page, _ = open_page(browser, f"file://{path}#rollouts/9/7/0")
    page.wait_for_selector("#detail .where")
    marks = page.locator("#detail header .message").first.locator(".hidden-char").all_inner_texts()
    assert marks[:4] == ["U+202E", "U+202C", "U+2067", "U+200F"]
    assert {"U+200B", "U+0000", "U+001B", "U+2028"} <= set(marks)
    page.close()


# ---- mathematics

MATHS = {
    r"\frac{1}{2}": "mfrac",
    r"\frac12": "mfrac",
    r"\sqrt[3]{x}": "mroot",
    r"x_i^2": "msubsup",
    r"\sum_{i=1}^n i": "munderover",
    r"\lim_{x\to 0} f'(x)": "munder",
    r"\left(\frac{a}{b}\right]": "mfrac",
    r"\begin{cases} 1 & x > 0 \\ 0 & \text{else} \end{cases}": "mtable",
    r"\mathbb{R} \le \infty": "mi",
    r"\boxed{50\%}": "mrow",
    r"\overline{AB} \cdot \vec{v} \pmod{7}": "mover",
    r"\binom{n}{k}": "mfrac",
    r"\operatorname{lcm}(4, 6) = 12{,}000": "mtext",
}
NO_MATHS = [
    r"\frac{1}",
    r"\nonsense{1}",
    r"\begin{tikzpicture}\end{tikzpicture}",
    "{",
    "}",
    r"\left(",
    r"\href{javascript:1}{x}",
    "a & b",
    "{" * 200,
    r"\sqrt" * 300,
    "",
    r"\text{",
]


TYPESET = """
window.typeset = (source) => {
  try {
    return toMathML(source, false).outerHTML;
  } catch (error) {
    if (error instanceof MathError) return null;
    throw error;
  }
};
window.rich = (text) => richText(document.createElement("div"), text).innerHTML;
"""


@pytest.fixture(scope="module")
def maths(browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    sources = "\n".join(_asset(f"{name}.js") for name in ("dom", "format", "text", "math_symbols", "math_parser"))
    page.evaluate(f"() => {{ {sources}\n{TYPESET} }}")
    yield page
    page.close()


@pytest.mark.parametrize("source", MATHS)
def test_mathematics_is_typeset(maths: Any, source: str):
    assert f"<{MATHS[source]}" in (maths.evaluate("s => typeset(s)", source) or "")


@pytest.mark.parametrize("source", NO_MATHS)
def test_what_is_no_mathematics_stays_as_it_is(maths: Any, source: str):
    assert maths.evaluate("s => typeset(s)", source) is None


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("it costs $5 and $6 in all", 0),
        ("so $x$ and $y$", 2),
        (r"thus \(a\) \[b\] $$c$$ \boxed{d}", 4),
        (r"price \$5 or \$6", 0),
        ("$a\nb$", 0),
        (r"\begin{align*} a &= b \\ c &= d \end{align*}", 1),
    ],
)
def test_where_mathematics_begins_and_ends(maths: Any, text: str, formulas: int):
    assert maths.evaluate("s => rich(s)", text).count("<math") == formulas


# ---- live


def test_a_run_is_followed(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ccpo.report.watch.PAUSE", 0.1)
    run = write_run(tmp_path / "run", steps=4)
    (run / "summary.json").unlink()
    with Server(run, 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        page, heard = open_page(browser, server.address)
        assert "not finished: step 4 of 4" in page.inner_text("#top")
        rollouts(page)
        page.fill("#f-query", "problem")
        page.click("#row-2")
        chosen = page.inner_text("#detail .where")
        page.focus("#f-query")
        server.source.reader.folder.append(run / "metrics.jsonl", metrics_of(5, 5, random.Random(0)))
        page.wait_for_selector("#top:has-text('step 5')", timeout=15_000)
        assert page.input_value("#f-query") == "problem"
        assert page.inner_text("#detail .where") == chosen
        assert page.evaluate("document.activeElement.id") == "f-query"
        assert {r.rsplit("/", 1)[1] for r in heard.requests} == {"", "data.json"}
        assert heard.errors == []
        page.close()
        server.shutdown()


# ---- speed


SEARCH = """(() => {
  const box = document.getElementById("f-query");
  box.value = "leaves";
  const begun = performance.now();
  box.dispatchEvent(new Event("input"));
  return performance.now() - begun;
})()"""


def test_a_long_run_is_written_and_opened_and_filtered_in_time(browser: Any, tmp_path: Path):
    run = write_run(tmp_path / "run", steps=200, problems=16, samples=8, pool=600)
    begun = time.process_time()
    path = write_report([run])
    assert time.process_time() - begun < 10
    assert path.stat().st_size < 10e6
    page, heard = open_page(browser, f"file://{path}")
    first = page.evaluate(
        "performance.getEntriesByType('paint').find(p => p.name === 'first-contentful-paint').startTime"
    )
    rollouts(page)
    assert count(page) == 10_000
    page.select_option("#f-scope", "all")
    spent = page.evaluate(SEARCH)
    assert 0 < count(page) < 10_000
    assert page.locator("#rows .row").count() < 60
    print(f"first paint {first:.0f} ms, filter {spent:.0f} ms, {path.stat().st_size / 1e6:.2f} MB")
    assert first < 1500
    assert spent < 1000
    assert "A sample: 10,000 of 25,600" in page.inner_text("#rollouts")
    assert "solver" in page.inner_text("#warnings .warning.warn h4 >> nth=0")  # a third of its turns is cut off
    assert "Try:" in page.inner_text("#warnings")
    assert violations(page) == []
    assert heard.errors == []
    page.close()
