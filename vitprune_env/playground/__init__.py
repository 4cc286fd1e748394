"""A page to play with: a picture, a policy, a budget, and what becomes of the tokens.

What the page computes is in `session`, `pictures`, `clicks` and `panels`, which need no Gradio; `page` puts it on the
screen.
"""
