"""Ablations: the same training for every variant of a grid and several seeds, and what follows from it.

`cells` trains, `journal` collects, `measured` keeps figures, `findings` compares with what a paper says, `page` has
what all pages share. The others are the codec's (its grid, how reconstructions are measured, its claims, its page)
and the prior's (`pathway*`, measured by `drawing`).
"""
