"""The environments' names in PettingZoo and Gymnasium, registered without loading the environments."""

from __future__ import annotations

import gymnasium
import pettingzoo

ENV_ID = "vitprune/TokenPruning-v0"


def register_envs() -> None:
    """Register the environments under `ENV_ID`; further calls do nothing.

    `pettingzoo.make("parallel", ENV_ID)`, `pettingzoo.make("aec", ENV_ID)`, `gymnasium.make(ENV_ID)` and
    `gymnasium.make_vec(ENV_ID, num_envs)` then work.
    PettingZoo before 1.27 has no `make`; there `parallel_env` and `vitprune_env.envs.parallel.env` are the way.
    """
    if hasattr(pettingzoo, "register"):
        if ENV_ID not in pettingzoo.parallel_registry:
            pettingzoo.register("parallel", ENV_ID, entry_point="vitprune_env.envs.parallel:parallel_env")
        if ENV_ID not in pettingzoo.aec_registry:
            pettingzoo.register("aec", ENV_ID, entry_point="vitprune_env.envs.parallel:env")
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            ENV_ID,
            entry_point="vitprune_env.envs.gym:SingleAgentEnv",
            vector_entry_point="vitprune_env.envs.gym_vector:SingleAgentVectorEnv",
        )
