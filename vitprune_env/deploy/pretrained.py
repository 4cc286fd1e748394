"""A pruned model as a folder: description and tensors of a policy file as `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vitprune_env.deploy.descriptions import DO_NOT_FIT
from vitprune_env.deploy.format_1 import upgrade_folder
from vitprune_env.deploy.policy_files import FORMAT
from vitprune_env.errors import CheckpointError
from vitprune_env.files import encode, replace_file, versions

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

MODEL_CARD = """---
library_name: vitprune_env
pipeline_tag: image-classification
tags: [vision-transformer, token-pruning]
---

# {backbone}, pruned by {policy}

A Vision Transformer that drops tokens after {sites}; pruned tokens are gone, later blocks do not compute on them.

```python
from vitprune_env import PrunedViT

model = PrunedViT.from_pretrained("this folder or repository").eval()
logits = model(images)  # [B, {channels}, {height}, {width}], normalised
```
"""


def write_folder(folder: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Write the files of a model, each of them atomically.

    Raises:
        StorageError: if one of them cannot be written.
    """
    # Under a key of its own, because the mixin of the hub takes keys at the top for arguments of the model.
    config = {"vitprune_env": {"format": FORMAT, "versions": versions(), **description}}
    replace_file(folder / WEIGHTS, encode(tensors, {"format": "pt"}))
    replace_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    replace_file(folder / CARD, card.encode())


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a model, in the terms of the present format.

    Raises:
        CheckpointError: if its files are missing, damaged, or something else.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())["vitprune_env"]
        tensors = load_file(folder / WEIGHTS)
        found = config.get("format")
        if found == 1:
            config = upgrade_folder(config)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, *DO_NOT_FIT) as error:
        raise CheckpointError(
            f"{folder}: expected {CONFIG} and {WEIGHTS} as PrunedViT.save_pretrained writes them, got {error!r}"
        ) from error
    if found not in (1, FORMAT):
        raise CheckpointError(f"{folder / CONFIG}: expected format {FORMAT} or 1, got {found!r}")
    return config, tensors
