"""What all tests share: one thread per process, reproducible hypothesis, the golden backbone."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded; two pytest workers share the cores

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from helpers import golden, golden_model
from vitprune_env.engine.backbone import Backbone

torch.set_num_threads(1)
for name, derandomize, examples in (("repeatable", True, 8), ("explore", False, 200)):
    settings.register_profile(
        name,
        derandomize=derandomize,
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def golden_backbone() -> Backbone:
    """The small ViT that the golden vectors were made with."""
    return Backbone(golden_model(), name="golden")


@pytest.fixture(scope="session")
def golden_images() -> Tensor:
    """The eight images that the golden vectors were made with."""
    return golden("images")["images"]
