"""The Markov game of token pruning in Vision Transformers."""
