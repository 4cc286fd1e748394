"""Eq. 3 against the authors' own training step: their buffer, their networks, four epochs, the parameters they got."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from games import keep_entropy, keep_log_prob
from helpers import golden
from vitprune_env.agents.learners.losses import policy_loss, value_loss


def network(part: str, stage: str = "init") -> nn.Sequential:
    """Actor or critic of the original code: four layers with tanh."""
    data = golden("rl4evit_mappo_update")
    layers: list[nn.Module] = []
    for number in (1, 2, 3, 4):
        weight, bias = (data[f"{stage}.{part}.fc{number}.{kind}"] for kind in ("weight", "bias"))
        layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def test_their_update_is_reproduced() -> None:
    """As their code has it: one-step advantages, plain value loss, no mask of the dead, agent ids as input."""
    data = golden("rl4evit_mappo_update")
    obs, keep = data["buf.obs_n"], data["buf.a_n"].bool()
    images, steps, agents, _ = obs.shape
    identity = torch.eye(agents).expand(images, steps, agents, agents)
    cls = data["buf.cls_token"][:, :, None].expand(-1, -1, agents, -1)
    target = data["buf.r_n"] + 0.99 * data["buf.v_n_"] * (1 - data["buf.done_n"])
    advantage = target - data["buf.v_n"]
    actor, critic = network("actor"), network("critic")
    optimizers = [torch.optim.Adam(net.parameters(), lr=5e-4) for net in (actor, critic)]
    losses: list[list[float]] = []
    for _ in range(4):
        for rows in (slice(0, 4), slice(4, 8)):
            logits: Tensor = actor(torch.cat([obs, identity], dim=-1)[rows])
            logit = logits[..., 1] - logits[..., 0]
            ratio = (keep_log_prob(logit, keep[rows]) - data["buf.a_logprob_n"][rows]).exp()
            actor_loss = policy_loss(ratio, advantage[rows], 0.2) - 0.01 * keep_entropy(logit).mean()
            value = critic(torch.cat([obs, cls, identity], dim=-1)[rows]).squeeze(-1)
            critic_loss = value_loss(value, value.detach(), target[rows], clip=None)
            for net, optimizer, loss in zip((actor, critic), optimizers, (actor_loss, critic_loss), strict=True):
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 10.0)
                optimizer.step()
            losses.append([actor_loss.item(), critic_loss.item()])
    expected = torch.stack([data["actor_losses"], data["critic_losses"]], dim=1)
    assert torch.allclose(torch.tensor(losses), expected, atol=1e-5)
    for part, net in (("actor", actor), ("critic", critic)):
        for one, two in zip(net.parameters(), network(part, "final").parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-5)
