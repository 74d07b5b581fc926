"""The model card of a bundle: README.md, which the Hugging Face hub shows."""

from __future__ import annotations

from freeexport.system.page import human_bytes
from freeexport.system.sheet import Sheet, markdown
from runtime.bundle.hub import HubName
from runtime.bundle.manifest import Manifest

CARD = "README.md"
TEXT = """\
---
{header}
---

# {title}

ONNX engines of a language model with an early exit, for freeexport.

{table}

## Use

`pip install 'freeexport[{extra},hub]'`, then, with this repository in place of OWNER/NAME:

```python
from freeexport import Session

with Session.from_pretrained("OWNER/NAME") as session:
    result = session.generate("{prompt}")
    print(result.text)
```
"""


def model_card(manifest: Manifest) -> str:
    """Return the card of a new bundle, without a licence, which the checkpoint does not name."""
    if manifest.speech is not None:
        task, prompt = "automatic-speech-recognition", "talk.wav"
    elif manifest.languages is not None:
        task, prompt = "translation", "Hello."
    else:
        task = "text2text-generation" if manifest.encoder_decoder else "text-generation"
        prompt = "Once upon a time"
    base = HubName.parse(manifest.source)
    header = [
        *([] if base is None else [f"base_model: {base.repository}"]),
        "library_name: freeexport",
        f"pipeline_tag: {task}",
        "tags: [onnx, early-exit]",
    ]
    exit = f"after layer {manifest.exit_layer} of {manifest.layers}"
    if manifest.ready_made_exit is not None:
        exit += f", the ready-made exit {manifest.ready_made_exit.name}"
    elif manifest.exit_trained is not None:
        exit += ", trained for it" if manifest.exit_trained else ", not trained for it"
    facts = {
        "base model": manifest.source,
        "family": manifest.family,
        "precision": f"{manifest.precision}, for {manifest.target}",
        "exit": exit,
        "verified against the base": "yes" if manifest.verified else "no",
        "size": human_bytes(sum(file.size for file in manifest.files.values())),
    }
    return TEXT.format(
        header="\n".join(header),
        title=manifest.source,
        table=markdown(Sheet("", ("", ""), tuple(facts.items()))),
        extra="cpu" if manifest.target == "cpu" else "gpu",
        prompt=prompt,
    )
