"""Budgets: what images may cost, and how a training run gets there.

`train` does all of this by itself. A loop of one's own needs four calls: the reward of an update, what came of it, and
in the end the calibration of the policy.

    >>> import torch
    >>> from vitprune_env import TokenGame, load_backbone, play
    >>> from vitprune_env.agents import Share, TokenActor, TokenPolicy
    >>> from vitprune_env.agents.learners.exploration import ExploringPolicy
    >>> from vitprune_env.data import Digits
    >>> images, labels = Digits("train", size=32).batch(range(32))
    >>> game = TokenGame(load_backbone("vit_digits"))
    >>> actor = TokenActor(game.backbone.embed_dim)
    >>> explorer = ExploringPolicy(actor, torch.Generator().manual_seed(0))
    >>> controller = Share(0.35).controller(game, updates=3, macs_per_token=actor.macs_per_token)
    >>> for update in range(3):
    ...     game.reward = controller.reward()
    ...     episode = play(game, explorer, images, labels)  # then learn from `episode`
    ...     row = controller.observe(episode.outcome)
    >>> policy = controller.calibrate(TokenPolicy(actor), [images])
    >>> bool(play(game, policy, images).outcome.macs.mean() <= controller.target)
    True

The reward is `SharedOutcome` unless another one is given; its price follows if it has one (a dataclass field `price`,
or a method `at_price(price)`). `controller.state()` and `controller.restore(state)` are for checkpoints.
"""
