"""What mkdocs needs to make one site of pages that lie in several folders."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "js/README.md": "javascript.md",
    "examples/browser/README.md": "browser.md",
    "CONTRIBUTING.md": "contributing.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere in the repository."""
    for place, name in ELSEWHERE.items():
        content = relinked((ROOT / place).read_text(encoding="utf-8"), posixpath.dirname(place))
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make the links of a page of docs/ hold in the site."""
    return markdown if page.file.src_uri in ELSEWHERE.values() else relinked(markdown, "docs")


def relinked(markdown: str, folder: str) -> str:
    """Links from a page in a folder of the repository as links in the site; of source files, the name."""

    def link(found: re.Match[str]) -> str:
        picture, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if "://" in target:
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / place).exists():
            raise FileNotFoundError(f"{folder}: a link to {place}, which isn't there")
        if place in ELSEWHERE or place.startswith("docs/"):
            return f"{picture}[{text}]({ELSEWHERE.get(place) or place.removeprefix('docs/')}{anchor})"
        return text

    return _LINK.sub(link, markdown)
