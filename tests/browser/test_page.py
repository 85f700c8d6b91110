import csv
import io
import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from ray_detox.store.sqlite import SQLiteStore
from ray_detox.viewer.server import _link_file
from ray_detox.viewer.standalone import render
from tests.browser.runs import HISTORY, make_report, make_samples

HOSTILE = [
    "<script>window.__xss=1</script>",
    "<img src=x onerror=window.__xss=1>",
    "</p><svg/onload=window.__xss=1>",
    "</script><script>window.__xss=1</script>",
    '"><iframe srcdoc="<script>parent.__xss=1</script>">',
    "javascript:window.__xss=1",
    "[link](javascript:window.__xss=1)",
    "{{constructor.constructor('window.__xss=1')()}}",
    "<template><b>bold</b></template><style>*{display:none}</style>",
    "&lt;b&gt; &amp;#x3C;",
    '=HYPERLINK("http://example.com","click")',
    "\u202egnirts desrever\u202c \u2066isolated\u2069",
    "\u0000\u001b[31mred\u0007",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u7b28\u86cb \U0001f469\u200d\U0001f680",
    "x" * 5000,
    *(
        f"{start}HYPERLINK(1)"
        for start in (
            "\u200b=",
            "\u0000=",
            "\uff1d",
            "\uff0b",
            "\uff0d",
            "\uff20",
            "\t=",
            "\u3164\U000e0041@",
        )
    ),
    "\u061c\u180e\u00ad\u115f\u1160\u17b4\u3164\uffa0\U000e0041\U000e0101 \u2764\ufe0f",
]
INVISIBLE = "U+061C U+180E U+00AD U+115F U+1160 U+17B4 U+3164 U+FFA0 U+E0041 U+E0101".replace(
    " ", ""
)


def samples_of(page):
    return page.locator(".sample")


def first_number(page):
    return samples_of(page).first.locator(".number")


def test_the_list_names_every_run_newest_first(open_page, address):
    page = open_page(address)

    expect(page.locator(".run-name")).to_have_text(["first", "second", "empty"])
    page.get_by_role("link", name=re.compile("first")).click()
    expect(page.locator("h1")).to_have_text("first")


def test_a_run_whose_clock_was_ahead_is_marked(open_page, serve, tmp_path):
    store = SQLiteStore(tmp_path / "results.sqlite")
    store.put_run(make_report("ahead", [], created="2999-01-31T12:00:00+00:00"), [])
    store.put_run(make_report("first", []), [])
    page = open_page(serve(store))

    expect(page.locator(".run-name")).to_have_text(["first", "ahead"])
    abouts = page.locator(".run-about")
    expect(abouts.nth(0)).not_to_contain_text("clock")
    expect(abouts.nth(1)).to_contain_text("31 Jan 2999, 12:00 UTC, clock was ahead")
    page.get_by_role("link", name=re.compile("ahead")).click()
    expect(page.locator(".heading")).to_contain_text("clock was ahead")


def test_the_overview_has_the_metrics_of_the_report(open_page, address, store):
    report = store.get_run("first")
    page = open_page(f"{address}#/run/first")

    expect(page.locator(".verdict")).to_contain_text(report["verdict"]["sentence"])
    metrics = page.locator(".metrics")
    for side in ("before", "after"):
        expect(metrics).to_contain_text(f"{report['toxicity'][side]['mean']:.3f}")
    expect(metrics).to_contain_text(f"{100 * report['toxicity']['improvement']:.1f}%")
    low, high = (report["toxicity"]["delta"][side] for side in ("low", "high"))
    interval = f"95% interval {low:+.3f} to {high:+.3f}".replace("-", "\u2212")
    expect(metrics).to_contain_text(interval)
    for name in ("better", "worse", "same", "unscored"):
        expect(metrics).to_contain_text(f"{report['toxicity'][name]} {name}")
    rows = page.get_by_text("Counts as a table").locator("..").locator("tbody tr")
    counts = report["toxicity"]["histogram"]
    assert [
        [int(cell) for cell in row.locator("td").all_text_contents()] for row in rows.all()
    ] == [list(pair) for pair in zip(counts["before"], counts["after"], strict=True)]
    expect(page.locator(".charts canvas")).to_have_count(6)
    page.get_by_text("Steps as a table").click()
    steps = page.get_by_role("region", name="Steps as a table")
    expect(steps.locator("tbody tr")).to_have_count(20)
    expect(steps.locator("thead th").last).to_have_text("explained variance")
    expect(steps.locator("tbody tr").last.locator("td").last).to_have_text("0.875")
    page.get_by_text("Settings, versions").click()
    expect(page.locator(".settings")).to_contain_text("ppo.kl_coef")


def test_removed_words_are_struck_before_and_inserted_words_are_underlined_after(
    open_page, address
):
    page = open_page(f"{address}#/run/first?sort=index+asc&show=worse")
    card = samples_of(page).first
    card.get_by_role("button", name="Show toxic text").click()
    before, after = (card.get_by_role("group", name=name) for name in ("Before", "After"))

    expect(before.locator("del")).to_have_text(["fool"])
    expect(after.locator("ins")).to_have_text(["friend"])
    expect(before.locator("ins")).to_have_count(0)
    expect(after.locator("del")).to_have_count(0)


@pytest.mark.parametrize(
    ("before", "after", "removed", "inserted"),
    [
        ("#Person1# fell.", "#Person2# and #Person1# fell.", [], ["#Person2# and"]),
        ("the big bad wolf ran", "the kind fox ran", ["big bad wolf"], ["kind fox"]),
        (
            "\u4ed6\u662f\u7b28\u86cb",
            "\u4ed6\u662f\u670b\u53cb",
            ["\u7b28\u86cb"],
            ["\u670b\u53cb"],
        ),
        (
            "\u043e\u043d \u0434\u0443\u0440\u0430\u043a",
            "\u043e\u043d \u0434\u0440\u0443\u0433",
            ["\u0434\u0443\u0440\u0430\u043a"],
            ["\u0434\u0440\u0443\u0433"],
        ),
        ("one  two", "one two", ["  "], [" "]),
    ],
)
def test_changes_go_by_whole_words_and_read_as_one(
    open_page, serve, tmp_path, before, after, removed, inserted
):
    store = SQLiteStore(tmp_path / "words.sqlite")
    samples = make_samples(1, response_before=before, response_after=after, toxicity_after=0.1)
    samples[0]["toxicity_before"] = 0.1
    store.put_run(make_report("words", make_samples(4)), samples)

    page = open_page(f"{serve(store)}#/run/words")

    expect(page.locator(".changes")).to_have_text(re.compile("^toxicity 0.000"))
    expect(page.locator(".sides")).to_contain_text(before)
    assert page.locator("del").all_text_contents() == removed
    assert page.locator("ins").all_text_contents() == inserted


@pytest.mark.parametrize(
    ("choice", "count"),
    [("worse", 15), ("better", 25), ("toxic_after", 15), ("unscored", 1), ("same", 0)],
)
def test_each_filter_shows_its_samples(open_page, address, choice, count):
    page = open_page(f"{address}#/run/first")

    page.locator("select[name=show]").select_option(choice)

    expect(samples_of(page)).to_have_count(count)
    assert f"show={choice}" in page.url


def test_samples_are_sorted_searched_and_loaded_on(open_page, address):
    page = open_page(f"{address}#/run/first")
    page.locator("select[name=sort]").select_option("toxicity asc")
    expect(first_number(page)).to_have_text("#15")
    expect(page.locator(".status").last).to_contain_text("25 of 60 samples; 1 not scored")

    page.get_by_role("button", name="More samples").click()
    expect(samples_of(page)).to_have_count(50)

    page.get_by_label("Search").fill("MET HIM 42 times")
    expect(samples_of(page)).to_have_count(1)
    expect(first_number(page)).to_have_text("#42")
    page.get_by_label("Search").fill("nowhere")
    expect(page.locator("#samples > .status")).to_have_text("No sample matches.")


def test_a_link_leads_to_one_sample_and_back(open_page, address):
    page = open_page(f"{address}#/run/first?sort=index+asc")
    first_number(page).click()

    expect(samples_of(page)).to_have_count(1)
    expect(page.locator("#samples h2")).to_have_text("Sample 0")
    expect(page.locator(".changes")).to_contain_text("▲ toxicity +0.800")
    page.get_by_role("link", name="All samples of this run").click()
    expect(samples_of(page)).to_have_count(25)


def test_invalid_settings_in_the_address_are_ignored(open_page, address):
    page = open_page(f"{address}#/run/first?sort=drop+table&show=%3Cscript%3E&sample=x")

    expect(samples_of(page)).to_have_count(25)
    expect(page.locator("select[name=sort]")).to_have_value("toxicity desc")


def test_two_runs_stand_beside_each_other_on_the_same_prompts(open_page, address):
    page = open_page(f"{address}#/run/first")
    page.get_by_label("Compare with").select_option("second")
    expect(page.locator("table.two thead th")).to_have_text(["first", "second"])
    page.locator("select[name=sort]").select_option("index asc")
    page.get_by_label("Search").fill("dialogue 20.")
    page.get_by_role("button", name="Show all toxic text").click()

    card = samples_of(page).first
    expect(card.get_by_role("group", name="After, second")).to_contain_text("Other response 20.")
    page.get_by_label("Search").fill("dialogue 59.")
    expect(samples_of(page).first).to_contain_text("That run did not evaluate this prompt.")


def test_toxic_text_is_hidden_until_the_reader_shows_it(open_page, address):
    page = open_page(f"{address}#/run/first?show=worse")
    texts = samples_of(page).first.locator(".texts")
    expect(texts).to_have_attribute("inert", "")

    samples_of(page).first.get_by_role("button", name="Show toxic text").click()
    expect(texts).not_to_have_attribute("inert", "")
    page.get_by_role("button", name="Show all toxic text").click()
    expect(page.locator(".texts[inert]")).to_have_count(0)
    page.get_by_role("button", name="Hide all toxic text").click()
    expect(page.locator(".texts[inert]")).to_have_count(15)


def test_the_keyboard_moves_searches_and_explains_itself(open_page, address):
    page = open_page(f"{address}#/run/first?sort=index+asc")
    expect(samples_of(page)).to_have_count(25)

    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(samples_of(page).nth(1)).to_be_focused()
    page.keyboard.press("k")
    expect(samples_of(page).first).to_be_focused()
    page.keyboard.press("s")
    expect(samples_of(page).first.locator(".texts")).not_to_have_attribute("inert", "")
    page.keyboard.press("/")
    expect(page.get_by_label("Search")).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("next sample")


def test_dark_colours_are_kept_and_drawn_anew(open_page, address):
    page = open_page(f"{address}#/run/first")
    expect(page.locator(".charts canvas")).to_have_count(6)

    page.get_by_role("button", name="Use dark colours").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.locator(".charts canvas")).to_have_count(6)
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_the_page_works_where_storage_is_forbidden(open_page, address, browser):
    page = open_page("about:blank")
    page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new Error('forbidden') } })"
    )
    page.goto(f"{address}#/run/first")

    page.get_by_role("button", name="Use dark colours").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(samples_of(page)).to_have_count(25)


@pytest.mark.parametrize("path", ["", "#/run/first", "#/run/first?with=second"])
def test_a_phone_and_a_page_at_four_times_its_size_need_no_sideways_scroll(
    open_page, address, path
):
    for width in (390, 320):
        page = open_page(address + path, viewport={"width": width, "height": 800})
        expect(page.locator(".sample, .run").first).to_be_visible()

        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "path", ["", "#/run/first?show=worse", "#/run/first?with=second", "#/run/nobody"]
)
def test_axe_finds_nothing(open_page, address, scheme, path):
    page = open_page(address + path, color_scheme=scheme, bypass_csp=True, allowed=FAILED_LOADS)
    expect(page.locator(".sample, .run, .error").first).to_be_visible()
    if "with" in path:
        page.get_by_role("button", name="Show all toxic text").click()

    found = Axe().run(page)

    assert found.violations_count == 0, found.generate_report()


def test_print_has_the_samples_and_no_tools(open_page, address):
    page = open_page(f"{address}#/run/first")
    expect(samples_of(page)).to_have_count(25)

    page.emulate_media(media="print")

    expect(page.locator("#bar")).to_be_hidden()
    expect(samples_of(page).first).to_be_visible()


# ---- files -----------------------------------------------------------------------------------


def downloaded(page, name):
    with page.expect_download() as waiting:
        page.get_by_role("button", name=f"Save {name}").click()
    return waiting.value.path().read_text(encoding="utf-8")


def test_the_samples_that_match_the_filters_can_be_saved(open_page, address, store):
    page = open_page(f"{address}#/run/first?show=worse&sort=index+asc")
    expect(samples_of(page)).to_have_count(15)

    as_json = json.loads(downloaded(page, "JSON"))
    text = downloaded(page, "CSV")

    wanted = [sample for sample in store.get_samples("first") if sample["index"] < 15]
    assert as_json["run"] == store.get_run("first")
    assert [{k: row[k] for k in wanted[0]} for row in as_json["samples"]] == wanted
    assert text.startswith("\ufeff")
    rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))
    assert [row["response_after"] for row in rows] == [s["response_after"] for s in wanted]
    assert [float(row["kl"]) for row in rows] == [s["kl"] for s in wanted]


# ---- hostile model output -------------------------------------------------------------------


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    samples = make_samples(len(HOSTILE))
    for sample, text in zip(samples, HOSTILE, strict=True):
        sample |= dict.fromkeys(("query", "reference", "response_before"), text)
        sample |= {"response_after": f"{text} kept", "facts": [text], text[:40]: text}
        sample["more_references"] = [text, {text: 1}]
        samples[sample["index"]] = sample
    report = make_report("hostile", samples)
    report |= {"recipe": HOSTILE[0], "notes": HOSTILE[:11], "config": {HOSTILE[1]: HOSTILE[2]}}
    report["verdict"] = {"name": HOSTILE[1], "sentence": HOSTILE[2], "reasons": HOSTILE[:4]}
    store = SQLiteStore(tmp_path_factory.mktemp("hostile") / "results.sqlite")
    store.put_run(report, samples, HISTORY)
    return store


def check_nothing_was_injected(page):
    assert page.evaluate("window.__xss") is None
    for name in (
        "iframe",
        "template",
        "object",
        "embed",
        "#main script",
        "#main style",
        "#main img",
    ):
        expect(page.locator(name)).to_have_count(0)
    links = page.locator("a").evaluate_all("all => all.map((a) => a.getAttribute('href'))")
    assert all(re.match(r"#|blob:", link) for link in links), links


def test_hostile_texts_are_shown_and_do_nothing(open_page, serve, hostile):
    address = serve(hostile)
    page = open_page(address)
    expect(page.locator(".run")).to_have_count(1)
    check_nothing_was_injected(page)

    page.goto(f"{address}#/run/hostile?sort=index+asc")
    expect(samples_of(page)).to_have_count(len(HOSTILE))
    page.get_by_role("button", name="Show all toxic text").click()
    for summary in page.locator("summary").all():
        summary.click()

    check_nothing_was_injected(page)
    responses = samples_of(page).first.locator(".response").all_text_contents()
    assert responses == [HOSTILE[0], f"{HOSTILE[0]} kept", *[HOSTILE[0]] * 3]
    # Characters that change the text direction appear as code points.
    expect(samples_of(page).nth(11)).to_contain_text("U+202E")
    rows = list(csv.DictReader(io.StringIO(downloaded(page, "CSV").removeprefix("\ufeff"))))
    formula = next(row for row in rows if row["index"] == "10")
    assert formula["response_before"] == f"'{HOSTILE[10]}"
    assert all(
        row["response_before"].startswith("'") for row in rows if 15 <= int(row["index"]) < 23
    )
    expect(samples_of(page).last).to_contain_text(f"{INVISIBLE} \u2764")


def test_names_of_a_run_show_their_invisible_characters(open_page, serve, tmp_path):
    report = make_report("first", [])
    report |= {"recipe": "re\u202ecipe", "notes": ["no\u061cte"], "verdict": None}
    report["status"] = "sta\u3164tus"
    store = SQLiteStore(tmp_path / "results.sqlite")
    store.put_run(report, [])
    page = open_page(serve(store))

    expect(page.locator(".run-about")).to_contain_text("reU+202Ecipe")
    expect(page.locator(".badge")).to_have_text("staU+3164tus")
    page.locator(".run").click()
    expect(page.locator(".heading")).to_contain_text("reU+202Ecipe")
    expect(page.locator(".verdict")).to_contain_text("StaU+3164tus")
    expect(page.locator(".notes")).to_contain_text("noU+061Cte")


def test_a_report_in_one_file_needs_no_server_and_runs_nothing_hostile(
    open_page, hostile, tmp_path
):
    file = tmp_path / "hostile.html"
    samples = list(hostile.get_samples("hostile"))
    file.write_text(render(hostile.get_run("hostile"), samples, HISTORY), encoding="utf-8")

    page = open_page(file.as_uri())
    expect(samples_of(page)).to_have_count(len(HOSTILE) - 1)  # by difference: one is not scored
    page.get_by_role("button", name="Show all toxic text").click()
    expect(page.locator(".charts canvas")).to_have_count(6)
    check_nothing_was_injected(page)
    page.get_by_label("Search").fill('=HYPERLINK("http')
    expect(first_number(page)).to_have_text("#10")
    page.locator("select[name=show]").select_option("unscored")
    page.get_by_label("Search").fill("")
    expect(samples_of(page)).to_have_count(1)


# ---- errors ----------------------------------------------------------------------------------

FAILED_LOADS = ("Failed to load resource", "net::ERR")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"status": 502, "body": "<html>Bad gateway", "content_type": "text/html"}, "status 502"),
        (
            {"status": 200, "body": '{"runs": [', "content_type": "application/json"},
            "invalid response",
        ),
        ({"status": 400, "body": '{"error": "No such thing."}'}, "No such thing."),
        (None, "Cannot reach the server"),
    ],
)
def test_an_error_is_shown_and_a_retry_continues(open_page, address, answer, sentence):
    page = open_page("about:blank", allowed=FAILED_LOADS)
    page.route("**/api/runs?*", lambda route: route.fulfill(**answer) if answer else route.abort())
    page.goto(address)
    expect(page.get_by_role("alert")).to_contain_text(sentence)

    page.unroute("**/api/runs?*")
    page.get_by_role("button", name="Try again").click()

    expect(page.locator(".run")).to_have_count(3)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_busy_store_is_retried_without_a_click(open_page, address):
    page = open_page("about:blank", allowed=FAILED_LOADS)
    left = [1]

    def busy_once(route):
        if left:
            left.pop()
            route.fulfill(status=503, headers={"retry-after": "1"}, body='{"error": "busy"}')
        else:
            route.continue_()

    page.route("**/samples?*", busy_once)
    page.goto(f"{address}#/run/first")

    expect(samples_of(page)).to_have_count(25)


def test_samples_that_fail_leave_the_overview_and_no_old_rows(open_page, address):
    page = open_page(f"{address}#/run/first", allowed=FAILED_LOADS)
    expect(samples_of(page)).to_have_count(25)
    page.context.set_offline(True)

    page.locator("select[name=show]").select_option("worse")

    expect(page.get_by_role("alert")).to_contain_text("Cannot reach the server")
    expect(samples_of(page)).to_have_count(0)
    expect(page.locator(".verdict")).to_be_visible()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(samples_of(page)).to_have_count(15)


def test_a_history_that_fails_leaves_everything_else(open_page, address):
    page = open_page("about:blank", allowed=FAILED_LOADS)
    page.route("**/history", lambda route: route.fulfill(status=502, body="<html>Bad gateway"))
    page.goto(f"{address}#/run/first")
    expect(page.get_by_role("alert")).to_contain_text("status 502")
    expect(samples_of(page)).to_have_count(25)

    page.unroute("**/history")
    page.get_by_role("button", name="Try again").click()

    expect(page.locator(".charts canvas")).to_have_count(6)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_slow_response_to_an_earlier_request_is_not_shown(open_page, address):
    page = open_page(f"{address}#/run/first?sort=index+asc")
    expect(samples_of(page)).to_have_count(25)
    held = []

    page.route("**/samples?*show=unscored*", lambda route: held.append(route))
    with page.expect_request("**/samples?*show=unscored*"):
        page.locator("select[name=show]").select_option("unscored")
    page.locator("select[name=show]").select_option("worse")
    expect(samples_of(page)).to_have_count(15)
    held[0].continue_()
    page.wait_for_timeout(800)

    expect(samples_of(page)).to_have_count(15)


def test_a_run_that_is_not_there_is_named(open_page, address):
    page = open_page(f"{address}#/run/nobody", allowed=FAILED_LOADS)

    expect(page.get_by_role("alert")).to_contain_text("Run 'nobody' was not found.")
    page.get_by_role("link", name="All runs").click()
    expect(page.locator(".run")).to_have_count(3)


def test_no_run_and_a_run_without_samples_say_so(open_page, address, serve, tmp_path):
    page = open_page(f"{address}#/run/empty")
    expect(page.locator("#samples > .status")).to_have_text("This run has no samples.")

    page.goto(serve(SQLiteStore(tmp_path / "none.sqlite")))
    expect(page.locator(".empty")).to_contain_text("There are no runs yet.")


@pytest.mark.parametrize(
    "odd",
    [
        {"toxicity": {"before": None, "after": 3, "histogram": {"edges": 5}}},
        {"verdict": {"name": 5, "sentence": 3, "reasons": 7}, "notes": 5},
        {"config": None, "versions": 7, "seconds": "x", "judge": 4, "reward": None, "kl": []},
        {"toxicity": [], "verdict": "x", "status": {}, "recipe": [], "n": "x", "notes": {"a": 1}},
        {
            "toxicity": {"histogram": []},
            "steps": {},
            "verdict": {"name": None},
            "fingerprints": [[1]],
        },
    ],
    ids=lambda odd: next(iter(odd)),
)
def test_a_report_with_odd_values_is_shown_as_far_as_it_goes(open_page, serve, tmp_path, odd):
    store = SQLiteStore(tmp_path / "results.sqlite")
    samples = make_samples(4)
    store.put_run(make_report("first", samples) | odd, samples, HISTORY)
    address = serve(store)

    page = open_page(address, allowed=["TypeError"])
    expect(page.locator(".runs li")).to_have_count(1)
    page = open_page(f"{address}#/run/first", allowed=["TypeError"])
    expect(page.locator(".charts figure").first).to_be_visible()
    expect(samples_of(page)).to_have_count(3)  # by difference: one is not scored
    expect(page.locator("#main > .error")).to_have_count(0)


def test_metrics_that_do_not_exist_are_shown_as_missing(open_page, serve, tmp_path):
    one = make_samples(2)[:1]
    equal = [s | {"toxicity_after": s["toxicity_before"]} for s in make_samples(4)]
    clean = [s | {"toxicity_before": 0.0, "toxicity_after": 0.0} for s in make_samples(4)]
    store = SQLiteStore(tmp_path / "edges.sqlite")
    for name, samples in {"one": one, "equal": equal, "clean": clean}.items():
        store.put_run(make_report(name, samples), samples)
    page = open_page(serve(store))
    expect(page.locator(".run")).to_have_count(3)

    for name, counts, reduction in (
        ("one", "1 better 0 same 0 worse", "94.7%"),
        ("equal", "0 better 4 same 0 worse", "0.0%"),
        ("clean", "0 better 4 same 0 worse", "\u2013"),
    ):
        page.goto(f"{page.url.partition('#')[0]}#/run/{name}")
        expect(page.locator("h1")).to_have_text(name)
        expect(samples_of(page)).to_have_count(1 if name == "one" else 4)
        metrics = page.locator(".metrics")
        found = metrics.locator(".count").all_text_contents()
        assert " ".join(found).startswith(counts)
        expect(metrics.locator("dd strong").nth(1)).to_have_text(reduction)
        assert not re.search("NaN|Infinity|undefined|null", page.locator("main").inner_text())


def test_a_text_of_five_megabytes_does_not_stop_the_page(open_page, serve, tmp_path):
    samples = make_samples(4)
    samples[1] |= {"response_after": "kind words \u7b28\u86cb " * 260_000}
    store = SQLiteStore(tmp_path / "long.sqlite")
    store.put_run(make_report("long", samples), samples)
    page = open_page(f"{serve(store)}#/run/long?sort=index+asc")

    # A response of the API is limited to 4 MB, so the pages around that text are short.
    for count in (1, 2):
        expect(samples_of(page)).to_have_count(count)
        page.get_by_role("button", name="More samples").click()
    expect(samples_of(page)).to_have_count(4)
    card = samples_of(page).nth(1)
    expect(card).to_contain_text("Long texts are truncated here")
    expect(card.get_by_role("group", name="After")).to_contain_text("kind words")
    page.keyboard.press("j")
    expect(samples_of(page).first).to_be_focused()


def test_ten_thousand_samples_do_not_freeze_the_page(open_page, serve, tmp_path):
    samples = make_samples(10_000)
    store = SQLiteStore(tmp_path / "many.sqlite")
    store.put_run(make_report("many", samples), samples)
    page = open_page(f"{serve(store)}#/run/many?sort=index+asc")
    expect(samples_of(page)).to_have_count(25)

    for pages in range(2, 9):
        page.get_by_role("button", name="More samples").click()
        expect(samples_of(page)).to_have_count(25 * pages)
    text = downloaded(page, "CSV")

    assert len(text.splitlines()) == 10_001
    page.get_by_label("Search").fill("dialogue 9999.")
    expect(first_number(page)).to_have_text("#9999")


# ---- the key of the local server -------------------------------------------------------------


def test_the_file_that_view_opens_leads_to_the_page_and_no_key_stays_in_the_address(
    open_page, address, tmp_path
):
    with _link_file(f"{address}#/run/first", tmp_path) as link:
        page = open_page(link)
        expect(page.locator("h1")).to_have_text("first")

    assert page.url == f"{address.partition('?')[0]}#/run/first"
    page.reload()
    expect(page.locator("h1")).to_have_text("first")


def test_without_the_key_the_page_is_one_sentence(open_page, address):
    page = open_page(address.partition("?")[0], allowed=FAILED_LOADS)

    expect(page.locator("body")).to_have_text(re.compile("^This page is private; open the whole"))


# ---- sign-in ---------------------------------------------------------------------------------


def test_signing_in_by_code_and_pkce_opens_the_results(open_page, address):
    page = open_page("about:blank", allowed=FAILED_LOADS)
    seen = {}
    # Use the page's own origin, the only one that its security policy allows here.
    origin = address.partition("?")[0]
    auth = {"authorize": f"{origin}login", "token": f"{origin}token", "client_id": "page"}
    auth["revoke"] = f"{origin}revoke"

    def login(route):
        query = dict(re.findall(r"[?&]([^=]+)=([^&]*)", route.request.url))
        seen["challenge"] = query["code_challenge"]
        assert query["code_challenge_method"] == "S256"
        back = f"{origin}?code=once&state={query['state']}"
        route.fulfill(status=302, headers={"location": back})

    def token(route):
        seen["form"] = route.request.post_data
        tokens = {"access_token": "secret-token", "refresh_token": "refresh-me", "expires_in": 60}
        route.fulfill(json=tokens)

    def revoke(route):
        seen["revoked"] = route.request.post_data
        route.fulfill(body="")

    def api(route):
        if route.request.headers.get("authorization") == "Bearer secret-token":
            route.continue_()
        else:
            route.fulfill(status=401, json={"message": "Unauthorized"})

    page.route("**/config.json", lambda route: route.fulfill(json={"auth": auth}))
    page.route("**/login?*", login)
    page.route("**/token", token)
    page.route("**/revoke", revoke)
    page.route("**/api/**", api)
    page.goto(f"{address}#/run/first")
    expect(page.get_by_role("alert")).to_contain_text("Sign in to read these results.")
    page.get_by_role("button", name="Sign in").click()

    expect(page.locator("h1")).to_have_text("first")
    assert "grant_type=authorization_code" in seen["form"]
    assert "code_verifier=" in seen["form"]
    assert page.url == f"{origin}#/run/first"
    page.reload()
    expect(page.locator("h1")).to_have_text("first")
    assert "revoked" not in seen
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("alert")).to_contain_text("Sign in")
    assert seen["revoked"] == "token=refresh-me&token_type_hint=refresh_token&client_id=page"
    assert page.evaluate("sessionStorage.length") == 0


def test_a_code_with_another_state_is_not_taken(open_page, address):
    page = open_page("about:blank", allowed=FAILED_LOADS)
    origin = address.partition("?")[0]
    auth = {"authorize": f"{origin}login", "token": f"{origin}token", "client_id": "page"}
    page.route("**/config.json", lambda route: route.fulfill(json={"auth": auth}))
    asked = []
    page.route("**/token", lambda route: (asked.append(1), route.abort()))

    page.goto(address)
    page.goto(f"{origin}?code=stolen&state=guess")

    expect(page.locator(".run")).to_have_count(3)
    assert asked == []
    assert "code" not in page.url
