"""MAPPO in TorchRL, on the batched environment.

    pip install vitprune_env[torchrl]
    python examples/frameworks/torchrl_mappo.py --iterations 60

The critic sees a token and the mean of its image's tokens. Losses are taken over tokens that are in the game: what the
pruned ones see and do means nothing. With trace parameter 1, no value of a pruned token enters an advantage.
"""

from __future__ import annotations

import torch
import tyro
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.modules import MLP, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from vitprune_env import SharedOutcome, TokenGame, TokenVectorEnv, benchmark, load_backbone
from vitprune_env.agents import TokenPolicy
from vitprune_env.data import Digits
from vitprune_env.integrations.torchrl import TokenEnv


def train(iterations: int = 60, seed: int = 0, images: int = 128, price: float = 0.05) -> nn.Module:
    """Train, and return the network that gives tokens `[rows, D]` their logits `[rows, 2]`."""
    torch.manual_seed(seed)
    game = TokenGame(load_backbone(), reward=SharedOutcome(price))
    env = TokenEnv(TokenVectorEnv(game, Digits("train", 2048), images, seed))
    width, frames = game.backbone.embed_dim, images * game.num_steps
    network = nn.Sequential(nn.LayerNorm(width), MLP(width, 2, num_cells=(32,), activation_class=nn.GELU))
    logits, own, around = ("tokens", "logits"), ("tokens", "observation"), ("tokens", "image")
    actor = ProbabilisticActor(
        TensorDictModule(network, [own], [logits]),
        spec=env.full_action_spec_unbatched,
        in_keys=[logits],
        out_keys=[("tokens", "action")],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        log_prob_key=("tokens", "log_prob"),
    )
    norm = nn.LayerNorm(width)
    critic_net = MLP(2 * width, 1, num_cells=(64, 64))
    critic = TensorDictModule(critic_net, [own, around], [("tokens", "state_value")])
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
    keys = ("action", "reward", "done", "terminated", "advantage", "value_target", "sample_log_prob", "value")
    loss.set_keys(**{k: ("tokens", {"sample_log_prob": "log_prob", "value": "state_value"}.get(k, k)) for k in keys})
    loss.make_value_estimator(ValueEstimators.GAE, gamma=1.0, lmbda=1.0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    for games in Collector(env, actor, frames_per_batch=frames, total_frames=iterations * frames):
        for part in (games, games["next"]):
            part[around] = part[own].mean(dim=-2, keepdim=True).expand_as(part[own])
        with torch.no_grad():
            loss.value_estimator(games, params=loss.critic_network_params, target_params=loss.target_critic_network_params)
        o = games["next", "outcome"][:, -1]
        print(o["correct"].float().mean().item(), o["macs"].mean().item() / game.cost.dense(), games["next","tokens","reward"].sum(1).mean().item())
        live = games["tokens"][games["tokens", "mask"]]
        for _ in range(4):
            for rows in live[torch.randperm(len(live))].split(4096):
                found = loss(TensorDict({"tokens": rows}, rows.batch_size))
                optimizer.zero_grad()
                (found["loss_objective"] + found["loss_critic"] + found["loss_entropy"]).backward()
                optimizer.step()
    return network


if __name__ == "__main__":
    policies = {"TorchRL MAPPO": TokenPolicy(tyro.cli(train)), "EViT": "evit"}
    images, tune = Digits("test", 500), Digits("train", 256)
    print(benchmark(policies, load_backbone(), images, tune=tune, budgets=(0.35,), seeds=2, timing=None).table())
