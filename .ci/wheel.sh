#!/usr/bin/env bash
# Use an installed wheel as a new user would, in a temporary folder:
#   bash .ci/wheel.sh VENV WHEEL CHECKOUT
set -euo pipefail
bin=$(realpath "$1")/bin wheel=$(realpath "$2") checkout=$(realpath "$3")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1

say() { printf -- '-- %s\n' "$*"; }

say "every data file of the packages is in the wheel"
"$bin/python" - "$wheel" "$checkout" <<'CHECK'
import subprocess
import sys
import zipfile

wheel, checkout = sys.argv[1:]
listed = ["git", "-C", checkout, "ls-files", "freeexport", "graphs", "runtime"]
tracked = {
    path
    for path in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()
    if not path.startswith("runtime/engines/kernels/source/")  # compiled into the library
}
missing = sorted(tracked - set(zipfile.ZipFile(wheel).namelist()))
assert tracked and not missing, f"not in the wheel: {missing}"
CHECK

model=$("$bin/python" -c 'import freeexport; print(freeexport.__path__[0])')/data/g2p
case $model in *site-packages*) ;; *) echo "not the installed package: $model" >&2; exit 1 ;; esac

mkdir readme application
# The included model stands in for the one on the hub, and random weights for a GGUF file.
mkdir -p readme/path/to readme/HuggingFaceTB
cp -r "$model" readme/path/to/checkpoint
cp -r "$model" readme/HuggingFaceTB/SmolLM2-135M-Instruct
PYTHONPATH=$checkout/tests "$bin/python" - <<'GGUF'
from pathlib import Path

from gguf_model import write_gguf

write_gguf(Path("readme/model.gguf"))
GGUF
head -n 40 "$model/test.jsonl" >readme/calibration.jsonl
run_page() { # FOLDER PAGE: run the blocks below <!-- run --> and <!-- serve -->
    (cd "$1" && PATH="$bin:$PATH" "$bin/python" - "$2" <<'PAGE'
import re
import subprocess
import sys

with open(sys.argv[1], encoding="utf-8") as page:
    blocks = re.findall(r"<!-- (run|serve) -->\n```(\w*)\n(.*?)```", page.read(), re.DOTALL)
assert blocks
for mark, language, text in blocks:
    if mark == "serve":
        # The first line is the server. The others are requests, sent as soon as it is ready.
        serve, requests = text.split("\n", 1)
        requests = requests.replace("curl ", "curl --retry 30 --retry-connrefused --retry-delay 1 ")
        text = f"exec {serve} & trap 'kill $!' EXIT\n{requests}"
    command = ["python", "-c", text] if language == "python" else ["bash", "-euxc", text]
    subprocess.run(command, check=True)
PAGE
    )
}

say "the commands and programs of the README and of a tutorial, in order, and the demo"
# Two run at a time with one thread each, because their models are too small for more threads.
export OMP_NUM_THREADS=1
application() {
    run_page application "$checkout/docs/tutorial-application.md"
    "$bin/freeexport" demo
}
failed=0
run_page readme "$checkout/README.md" >readme.log 2>&1 & readme=$!
application >application.log 2>&1 & application=$!
wait "$readme" || failed=$?
wait "$application" || failed=$?
cat readme.log application.log
[ "$failed" = 0 ]

say "bad input is one line, and what stood there still stands"
if "$bin/freeexport" convert "$model" readme/bundle 2>error.txt; then echo "converted over a bundle" >&2; exit 1; fi
grep -q '^error: ' error.txt && [ "$(wc -l <error.txt)" = 1 ]
"$bin/freeexport" inspect readme/bundle >/dev/null

say "an application"
"$bin/python" - <<'APPLICATION'
from runtime import Session

with Session("readme/bundle") as session:
    result = session.generate("good morning", max_new_tokens=32, threshold=0.8)
    streamed = "".join(token.text for token in session.stream("good morning", max_new_tokens=32, threshold=0.8))
    full = session.generate("good morning", max_new_tokens=32, mode="full")
    lossless = session.generate("good morning", max_new_tokens=32, mode="lossless", threshold=0.5)
assert streamed == result.text, (streamed, result.text)
assert lossless.token_ids == full.token_ids, (lossless, full)
print(result.text, f"{result.stats.exit_rate:.0%} exited")
APPLICATION
