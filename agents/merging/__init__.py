"""Learnt merging: each token of a pair decides whether it goes into the token that is most like it."""
