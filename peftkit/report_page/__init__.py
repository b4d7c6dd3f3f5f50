"""Self-contained HTML pages with tables and charts: no script, style, font or image is loaded from elsewhere.

Pages follow the reader's light or dark setting and are readable on a phone. A chart is data first (``charts``); ``to_svg`` draws it
for a page or as a file, and ``to_png`` draws it with matplotlib, which only this function needs.
"""

from peftkit.report_page.charts import Bar, Bars, Group, Line, Lines, Part, Stack
from peftkit.report_page.markup import (
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
from peftkit.report_page.png import to_png, write_chart
from peftkit.report_page.svg import to_svg

__all__ = [
    "Bar",
    "Bars",
    "Group",
    "Line",
    "Lines",
    "Part",
    "Stack",
    "Tile",
    "bullets",
    "chosen",
    "command",
    "details",
    "figure",
    "figures",
    "page",
    "paragraph",
    "section",
    "table",
    "tiles",
    "to_png",
    "to_svg",
    "write_chart",
    "write_page",
]
