"""A hook of MkDocs: adds the pages of the repository that are not in ``docs/`` to the site, and the files that pages link to.

Links between the files of a repository work on its host. In the site the pages are elsewhere, so their relative links are rewritten.
A link to a page leads to its place in the site. Other files are copied into the site, and a folder gets a page that lists its files.
MkDocs then checks all links; ``make docs`` fails if one is broken.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "operations.md",
}
"""The pages outside ``docs/``, and their places in the site."""

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and the files and folders to which pages link."""
    for path, place in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    for file in list(files.documentation_pages()):
        for target in _targets(file):
            place = place_of(target)
            if files.get_file_from_path(place) is not None:
                continue
            source = ROOT / target
            if source.is_dir():
                added = File.generated(config, place, content=_listing(target))
            else:
                added = File.generated(config, place, abs_src_path=str(source))
            files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the relative links of a page."""
    path = _path_in_repository(page.file.src_uri)
    if path is None:
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def rewrite(link: re.Match) -> str:
        place = place_of(_target(path, link[1]))
        return f"]({posixpath.relpath(place, here or '.')}{link[2] or ''})"

    return _LINK.sub(rewrite, markdown)


def place_of(target: str) -> str:
    """The place in the site of a file or folder of the repository, both as paths with slashes."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if (ROOT / target).is_dir():
        return f"repository/{target}/index.md"
    # a page of the site ends in .md, so other Markdown files are shown as text
    return f"repository/{target.replace('.md', '.md.txt')}"


def _targets(file: File) -> list[str]:
    path = _path_in_repository(file.src_uri)
    if path is None:
        return []
    return [_target(path, link[1]) for link in _LINK.finditer(file.content_string)]


def _target(page: str, link: str) -> str:
    """The path in the repository to which a page links."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if not (ROOT / target).exists():
        raise PluginError(f"{page} links to {link!r}, which does not exist")
    return target


def _path_in_repository(place: str) -> str | None:
    """The path of a page's source, or ``None`` for the page of a folder."""
    if place.startswith("repository/"):
        return None
    return next((path for path, own in PAGES.items() if own == place), f"docs/{place}")


def _listing(folder: str) -> str:
    """A page with the names and first lines of a folder's files."""
    lines = [f"# {folder}", ""]
    for path in sorted((ROOT / folder).iterdir()):
        if path.is_file():
            first = path.read_text(encoding="utf-8").strip().partition("\n")[0]
            title = first.strip('#" ')
            lines.append(f"- `{path.name}`: {title}")
        elif not path.name.startswith(("_", ".")):
            lines.append(f"- `{path.name}/`")
    return "\n".join(lines) + "\n"
