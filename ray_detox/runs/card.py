"""The model card of an adapter or an exported model, in the form that the Hugging Face hub reads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox import __version__
from ray_detox.runs.printable import printable
from ray_detox.runs.report_text import describe_result

if TYPE_CHECKING:
    from ray_detox.config import RunConfig

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForSeq2SeqLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, "path/to/this/folder")"""
_LOAD_MODEL = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForSeq2SeqLM.from_pretrained("path/to/this/folder")"""


def model_card(
    config: "RunConfig",
    run_id: str,
    report: Mapping[str, Any] | None = None,
    *,
    steps: int | None = None,
    merged: bool = False,
) -> str:
    """Return the model card of what a run has trained.

    Args:
        config: settings of the run.
        run_id: of the run.
        report: of the run; None if these weights were not measured.
        steps: PPO steps that these weights have had; None takes `train.steps`.
        merged: the adapter is merged into its base model.
    """
    base, is_hub_id = _base(config)
    about = [f"library_name: {'transformers' if merged else 'peft'}", "tags: [ray-detox, ppo]"]
    if is_hub_id:
        about.append(f"base_model: {base}")
    what = "with a LoRA adapter merged into it" if merged else "a LoRA adapter for it"
    load = _LOAD_MODEL if merged else _LOAD_ADAPTER.format(base=json.dumps(base))
    measured = "These weights were not measured." if report is None else describe_result(report)
    done = config.train.steps if steps is None else steps
    lines = "\n".join(about)
    return f"""---
{lines}
---

# {run_id}

{_code(base)}, {what}. ray-detox {__version__} trained it with PPO to write less toxic text.

- Run: {_code(run_id)}, recipe {_code(config.recipe)}, seed {config.seed}
- Training: {done} PPO steps of {config.ppo.prompts_per_step} prompts, LoRA rank {config.policy.lora_rank}
- Data: {_code(_name(config.data.path))}
- Prompt: {_code(json.dumps(config.data.template, ensure_ascii=False))}
- Reward model: {_code(_name(config.reward.model))}

## Measured on held-out prompts

```
{measured}
```

## Use

```python
{load}
```
"""


def _base(config: "RunConfig") -> tuple[str, bool]:
    """Return the name of the base model, and whether it is an id on the hub."""
    model = config.policy.model
    if model == "lab":
        return "ray_detox/lab/models/t5", False
    return _name(model), _HUB_ID.fullmatch(model) is not None


def _name(source: str) -> str:
    """Return the name of a model or of data; a path of this machine says nothing elsewhere."""
    return Path(source).name if Path(source).is_absolute() else source


def _code(text: str) -> str:
    """Quote text that somebody else may have written, so that it cannot become markup."""
    return f"`{printable(text).replace('`', chr(39))}`"
