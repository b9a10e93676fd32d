"""Export stage: the dialled model as a folder that transformers and vLLM load without ctrlray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctrlray import config
from ctrlray.control import ControlSpace, dialled_template, safe_template, special_strings
from ctrlray.ledger import StageResult
from ctrlray.models import PreparedBase
from ctrlray.tables import written

CARD = "ctrlray.json"
"""The file in an exported folder that describes its dial."""
START = "start"
"""The method of a folder that holds the model before training: it knows no control codes."""


def finish(folder: str, base: PreparedBase, job: config.Job, method: str, figures: Mapping[str, Any]) -> StageResult:
    """Turn a merged model folder into the exported one: its dial's ranges and defaults, and its card."""
    from transformers import AutoTokenizer

    space = ControlSpace.of(job.control)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = dialled_template(
        base.base_template,
        space,
        special_strings(tokenizer, space),
        allowed=job.export.levels,
        defaults=job.export.defaults,
    )
    target = Path(folder)
    with written(folder):
        tokenizer.save_pretrained(folder)
        (target / "ctrlray_base.json").unlink(missing_ok=True)
        (target / CARD).write_text(json.dumps(dial(job, method), indent=1) + "\n")
        (target / "README.md").write_text(card(job, method, figures))
    return StageResult(1, 1, facts={"folder": folder, "method": method})


def finish_start(folder: str, base: PreparedBase, job: config.Job) -> None:
    """Turn a copy of the prepared base into a folder that is served like the exported ones, for best-of-n towards a setting.

    Its chat template places no code; text is neutralised as everywhere.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    specials = special_strings(tokenizer, ControlSpace.of(job.control))
    tokenizer.chat_template = safe_template(base.base_template, specials)
    with written(folder):
        tokenizer.save_pretrained(folder)
        (Path(folder) / "ctrlray_base.json").unlink(missing_ok=True)
        (Path(folder) / CARD).write_text(json.dumps(dial(job, START), indent=1) + "\n")


def dial(job: config.Job, method: str) -> dict[str, Any]:
    """What the exported dial takes: attributes in code order with their allowed levels and defaults."""
    attributes = []
    for a in job.control.attributes:
        low, high = job.export.levels.get(a.name, (1, a.levels))
        default = job.export.defaults.get(a.name, high)
        attributes.append({"name": a.name, "levels": a.levels, "low": low, "high": high, "default": default})
    return {"attributes": attributes, "encoding": job.control.encoding, "method": method, "base": job.model.name}


def card(job: config.Job, method: str, figures: Mapping[str, Any]) -> str:
    """The model card, generated from the run's own figures."""
    rows = dial(job, method)["attributes"]
    table = "\n".join(f"| `{r['name']}` | {r['low']} to {r['high']} | {r['default']} |" for r in rows)
    example = ", ".join(f"{r['name']}={r['high']}" for r in rows)
    measured = "\n".join(f"| {name} | {value} |" for name, value in figures.items()) or "| none | |"
    text_note = (
        "\nThe control code is plain text: users can imitate it in their messages.\n" if job.control.encoding == "text" else ""
    )
    return f"""---
library_name: transformers
base_model: {job.model.name}
tags: [ctrlray, controllable, {method}]
---
# {job.name}: a dialled chat model

Made by ctrlray from `{job.model.name}` with the objective `{method}` (arXiv 2404.01295). Each request sets:

| attribute | levels | default |
|---|---|---|
{table}

```python
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, {example}, return_dict=True, return_tensors="pt")
model.generate(**inputs, max_new_tokens=256)
```

On a vLLM server send `"chat_template_kwargs": {{...}}` with the same names. Other levels raise an error.
{text_note}
## Measured on held-out prompts

| figure | value |
|---|---|
{measured}

## Intended use

Research on controllable safety and helpfulness. The dial shifts tendencies that a reward model measures; it is no guarantee of
safe output. Operators should set levels, not end users, and keep their other safeguards. Levels below the defaults exist to
study the trade-off, and should not be offered to the public.
"""
