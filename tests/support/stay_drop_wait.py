"""An action kind of a user's own: tokens may also wait outside the computation, as in Evo-ViT."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vitprune_env.envs.actions import ActionKind, KeepActions
from vitprune_env.types import Decision, Observation


@dataclass(frozen=True)
class StayDropWait(ActionKind):
    """0 = drop, 1 = stay, 2 = wait: a waiting token costs nothing, acts again at the next site and may then return."""

    name = "stay_drop_wait"

    def meaning(self, num_agents: int) -> str:
        return "0 (drop), 1 (stay) or 2 (wait)"

    def count(self, num_agents: int) -> int:
        return 3

    def decision(self, actions: Tensor, obs: Observation) -> Decision:
        return Decision(keep=(actions > 0) & obs.present, park=(actions == 2) & obs.present)

    def encode(self, decision: Decision, obs: Observation) -> Tensor:
        stays = KeepActions().encode(replace(decision, park=None), obs)  # refuses merges
        return stays if decision.park is None else stays + decision.park

    def unseen_actions(self, obs: Observation) -> Tensor:
        return obs.present.long()  # a learner lets waiting tokens come back at the next site
