"""MAPPO in TorchRL, on the batched environment.

    pip install vitprune_env[torchrl]
    python examples/frameworks/torchrl_mappo.py --iterations 40

Every token that is still in the game is one row of the losses; what pruned tokens see and do means nothing. The critic
sees a token and the mean of its image's tokens. Returns are undiscounted sums of what follows, which keeps values of
pruned tokens out of the advantages.
"""

import torch
import tyro
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.modules import MLP, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss

from vitprune_env import SharedOutcome, TokenGame, TokenVectorEnv, benchmark, load_backbone
from vitprune_env.agents import ModulePolicy
from vitprune_env.data import Digits
from vitprune_env.integrations.torchrl import TokenEnv


def policy_of(network: torch.nn.Module, *group: str) -> ProbabilisticActor:
    """The network as TorchRL's policy; its keys are those of a group, or of single rows."""
    seen, logits, action, log_prob = ((*group, key) for key in ("observation", "logits", "action", "action_log_prob"))
    drawn = {"distribution_class": torch.distributions.Categorical, "return_log_prob": True, "log_prob_key": log_prob}
    return ProbabilisticActor(TensorDictModule(network, [seen], [logits]), [logits], [action], **drawn)


def train(iterations: int = 40, seed: int = 0, images: int = 128) -> torch.nn.Module:
    """Train, and return the network that gives tokens `[rows, D]` their logits `[rows, 2]`."""
    torch.manual_seed(seed)
    game = TokenGame(load_backbone(), reward=SharedOutcome(price=0.03))
    env = TokenEnv(TokenVectorEnv(game, Digits("train", 2048), images, seed))
    width, frames = game.backbone.embed_dim, images * game.num_steps
    network = MLP(width, 2, num_cells=(32,))
    critic = TensorDictModule(MLP(2 * width, 1, num_cells=(64, 64)), ["observation", "image"], ["state_value"])
    loss = ClipPPOLoss(policy_of(network), critic, entropy_coeff=0.01, normalize_advantage=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    player = policy_of(network, "tokens")
    for games in Collector(env, player, frames_per_batch=frames, total_frames=iterations * frames):
        tokens, rewards = games["tokens"], games["next", "tokens", "reward"]
        print(f"mean return {rewards.sum(dim=1).mean():.3f}")
        tokens["image"] = tokens["observation"].mean(dim=2, keepdim=True).expand_as(tokens["observation"])
        tokens["value_target"] = rewards.flip(1).cumsum(dim=1).flip(1)
        live = tokens[tokens["mask"]]
        live["advantage"] = (live["value_target"] - critic(live.clone())["state_value"]).detach()
        for rows in (rows for _ in range(4) for rows in live[torch.randperm(len(live))].split(4096)):
            optimizer.zero_grad()
            sum(loss(rows).select("loss_objective", "loss_critic", "loss_entropy").values(), torch.zeros(())).backward()
            optimizer.step()
    return network


if __name__ == "__main__":
    backbone, test, tune = load_backbone(), Digits("test", 500), Digits("train", 256)
    policies = {"TorchRL MAPPO": ModulePolicy(tyro.cli(train), backbone.embed_dim), "EViT": "evit"}
    print(benchmark(policies, backbone, test, tune=tune, budgets=(0.35,), seeds=2, timing=None).table())
