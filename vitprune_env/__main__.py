"""The command `vitprune` as `python -m vitprune_env`."""

from vitprune_env.cli import main

if __name__ == "__main__":
    main()
