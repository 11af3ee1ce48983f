"""The frame of a page: one file that loads nothing from anywhere, with a content policy that would forbid it."""

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from unicom_dist.tracking.report.assets import CSS, SCRIPT
from unicom_dist.tracking.report.html import Markup, tag

Section = tuple[str, str, Markup | None]  # anchor, heading, content


def document(title: str, header: Markup, sections: Sequence[Section]) -> str:
    """The whole page as HTML; `title` is the browser's. Sections without content are left out."""
    # The page may run its own script and show its own pictures; everything else is refused by the browser.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    shown = [section for section in sections if section[2]]
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in shown]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    body = tag(
        "body",
        header,
        tag("nav", *links),
        tag("main", *(tag("section", tag("h2", name), content, id=anchor) for anchor, name, content in shown)),
        tag("div", id="tip", hidden=True),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def write_page(path: Path, page: str) -> None:
    """Write a page; a file that is there is replaced when the new one is whole. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
