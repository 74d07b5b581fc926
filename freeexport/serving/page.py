"""The chat page at `/`: one static file, with headers that let it reach only this server."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


@cache
def page() -> Response:
    """Return the page.

    Its content security policy allows the script and the style of the file, by their hashes, and
    requests to the server that sent it. Markup in prompts and answers could therefore run nothing
    and load nothing, even if the page inserted it as HTML.
    """
    content = FILE.read_bytes()
    allowed = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
            for text in re.findall(f"<{tag}>(.*?)</{tag}>".encode(), content, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, headers=headers, media_type="text/html")
