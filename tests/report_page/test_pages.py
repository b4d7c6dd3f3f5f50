"""Pages: nothing is loaded from elsewhere, texts are escaped; in a browser tables sort, filters filter, and a phone is wide enough."""

import re

import pytest

from peftkit.report_page import (
    Bar,
    Bars,
    Group,
    Tile,
    bullets,
    chosen,
    command,
    details,
    figure,
    figures,
    page,
    paragraph,
    section,
    table,
    tiles,
    write_page,
)

ROWS = [["b <x>", ("2.0 s", 2.0)], ["a", ("10 s", 10.0)], ["c", ""]]
KEYS = [{"kind": "one"}, {"kind": "two"}, {"kind": "two"}]


@pytest.fixture
def text():
    """A page with one of everything, and a table that is wider than a phone."""
    wide = [[f"name {i}", *(f"value {j} of a wide table" for j in range(12))] for i in range(3)]
    chart = Bars("chart <c>", [Group("seconds", [Bar("a long name " * 3, 1.0, "1.0 s", True)])])
    return page(
        "Title & more",
        tiles([Tile("0 % → 90 %", "exact match", wide=True), Tile("yes", "agrees")]),
        section(
            "Rows",
            paragraph("Some `code <y>` here."),
            chosen("rows", {"kind": ("Kind", ["one", "two"])}, search=True),
            table(["name", "time"], ROWS, sortable=True, keys=KEYS, name="rows"),
            table(["a"] * 13, wide),
            chosen("pictures", {"kind": ("Kind", ["one", "two"])}, every=False),
            figures(
                *(figure(chart, "caption", {"kind": kind}) for kind in ("one", "two")),
                name="pictures",
            ),
            bullets(["a <b>"]),
            details("more", command("make demo ARGS='<z>' --with-many-options" * 4)),
        ),
        lead="A lead.",
    )


def test_nothing_is_loaded_and_everything_is_escaped(text):
    assert not re.search(r"\b(src|href)=|@import|url\(|https?://", text)
    assert not re.search(r"<[xycbz]>", text)
    assert set(re.findall(r"&lt;([xycbz])&gt;", text)) == set("xycbz")
    assert "Title &amp; more" in text
    assert 'name="viewport"' in text


def test_a_page_is_written_whole(tmp_path, text):
    write_page(tmp_path / "deep" / "page.html", text)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["page.html"]
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8") == text
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_page(tmp_path / "taken", text)
    assert {file.name for file in tmp_path.iterdir()} == {"deep", "taken"}


NAMES = """[...document.querySelectorAll("[data-table=rows] tbody tr")].filter(r => !r.hidden).map(r => r.cells[0].textContent)"""


def test_a_click_on_a_title_sorts_by_number_or_name(text, in_browser):
    click = 'document.querySelectorAll("[data-table=rows] th button")[{}].click();'
    assert in_browser(text, NAMES) == ["b <x>", "a", "c"]
    assert in_browser(text, click.format(0) + NAMES) == ["a", "b <x>", "c"]
    assert in_browser(text, click.format(1) + NAMES) == ["b <x>", "a", "c"]
    assert in_browser(text, click.format(1) * 2 + NAMES) == ["a", "b <x>", "c"]  # empty cells last


def test_controls_show_what_is_chosen(text, in_browser):
    choose = """
    const select = document.querySelector("[data-filters=rows] select");
    select.value = "two"; select.dispatchEvent(new Event("change"));
    """
    assert in_browser(text, choose + NAMES) == ["a", "c"]
    search = """
    const field = document.querySelector("input[type=search]");
    field.value = "10 S"; field.dispatchEvent(new Event("input"));
    """
    assert in_browser(text, search + NAMES) == ["a"]
    seen = "[...document.querySelectorAll('[data-figures] figure')].map(f => f.hidden)"
    assert in_browser(text, seen) == [False, True]


@pytest.mark.parametrize("width", [390, 1000])
def test_the_page_never_scrolls_sideways(text, in_browser, width):
    script = """(() => {
      document.querySelector("details").open = true;
      const root = document.documentElement;
      return [root.scrollWidth, root.clientWidth, document.querySelectorAll(".scroll")[1].scrollWidth];
    })()"""
    inside, seen, wide = in_browser(text, script, width=width)
    assert inside <= seen == width
    if width == 390:
        assert wide > width  # the wide table scrolls by itself


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast_in_light_and_dark(text, in_browser, dark):
    script = """(() => {
      const light = colour => {
        const [r, g, b] = colour.match(/\\d+/g).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const page = light(getComputedStyle(document.body).backgroundColor);
      const parts = ["h1", ".lead", "td", "figcaption"].map(s => getComputedStyle(document.querySelector(s)).color);
      parts.push(getComputedStyle(document.querySelector("svg text")).fill);
      return [page, parts.map(c => { const l = light(c); return (Math.max(l, page) + 0.05) / (Math.min(l, page) + 0.05); })];
    })()"""
    background, ratios = in_browser(text, script, dark=dark)
    assert (background < 0.1) is dark
    assert min(ratios) >= 4.5  # the least contrast of text by WCAG 2.1, 1.4.3
