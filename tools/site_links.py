"""Hook of mkdocs: links of pages to files outside docs/ lead to the repository, or are plain text.

mkdocs.yml names this file. Without REPOSITORY_URL no address of the repository is known.
"""

from __future__ import annotations

import os.path
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace links that leave docs/."""
    folder = os.path.dirname(page.file.src_uri)

    def replaced(link: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join("docs", folder, link[2])).replace(os.sep, "/")
        if path.startswith("docs/"):
            return link[0]
        address = config["repo_url"]
        return f"[{link[1]}]({address.rstrip('/')}/blob/HEAD/{path})" if address else link[1]

    return _LINK.sub(replaced, markdown)
