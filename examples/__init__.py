"""Short programs, one verb each: `python examples/train_mappo.py`, or `python -m vitprune_env.examples.train_mappo`."""
