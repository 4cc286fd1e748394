"""A pruned model as a folder: a policy file with its network, and a readable copy of its header.

What is loaded stands in one file: a folder whose writing was interrupted holds the old model or the new one. The copy
is for readers and for the Hugging Face hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vitprune_env.deploy.descriptions import DO_NOT_FIT
from vitprune_env.deploy.format_1 import upgrade_folder
from vitprune_env.deploy.policy_files import FORMAT, KIND, read_policy_file
from vitprune_env.errors import CheckpointError
from vitprune_env.files import HEADER, read_tensors, replace_file, versions, write_file

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
    """Write the files of a model, each of them atomically; a README.md that is no card of this package stays.

    Raises:
        StorageError: if one of them cannot be written.
    """
    header = {"format": FORMAT, "versions": versions(), **description}
    write_file(folder / WEIGHTS, tensors, {"kind": KIND, **header})
    # Under a key of its own, because the mixin of the hub takes keys at the top for arguments of the model.
    replace_file(folder / CONFIG, (json.dumps({"vitprune_env": header}, indent=2) + "\n").encode())
    head = card.partition("\n#")[0].encode()
    if not (folder / CARD).is_file() or (folder / CARD).read_bytes().startswith(head):  # no README of somebody's own
        replace_file(folder / CARD, card.encode())


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a model, in the terms of the present format.

    Raises:
        CheckpointError: if its files are missing, damaged, or something else.
    """
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: expected {WEIGHTS} as PrunedViT.save_pretrained writes it, found none")
    tensors, metadata = read_tensors(folder / WEIGHTS)
    return read_policy_file(folder / WEIGHTS) if HEADER in metadata else (_read_config(folder), tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    """The description of a model whose weights do not say what they are: those of 0.1, and the first of format 2."""
    try:
        config = json.loads((folder / CONFIG).read_text())["vitprune_env"]
        found = config.get("format")
        if found == 1:
            config = upgrade_folder(config)
    except CheckpointError:
        raise
    except (OSError, *DO_NOT_FIT) as error:
        raise CheckpointError(
            f"{folder}: expected {CONFIG} and {WEIGHTS} as PrunedViT.save_pretrained writes them, got {error!r}"
        ) from error
    if found not in (1, FORMAT):
        raise CheckpointError(f"{folder / CONFIG}: expected format {FORMAT} or 1, got {found!r}")
    return config
