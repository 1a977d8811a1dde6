"""The report's page around its sections: style sheet, script, and the frame that forbids any outside request.

Style and script stand beside this file as report.css and report.js and are copied into every page. The page's
Content-Security-Policy allows inline styles and exactly one script, by its hash: nothing that a model wrote can run or
load anything, and the page reads the same from a disk, a mail or a web server.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files


def page(*, title: str, contents: str, body: str) -> str:
    """The whole document. `title` is escaped text; `contents` and `body` are HTML."""
    beside = files("topologies")
    style = beside.joinpath("report.css").read_text(encoding="utf-8")
    script = beside.joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body>"
        '<button id="theme" type="button">light / dark</button>'
        f'<div class="page">{contents}<main>{body}</main></div><div id="tip" role="status"></div>'
        f"<script>{script}</script></body></html>\n"
    )
