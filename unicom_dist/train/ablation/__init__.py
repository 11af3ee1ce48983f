"""Ablations: the same training for every variant of a grid and several seeds, and what follows from it.

`cells` trains, `journal` collects, `measured` keeps figures, `findings` compares with what a paper says, `page` has
what all pages share. The others are the codec's (its grid, the paper's claims, the page, how reconstructions are measured)
and the prior's (`pathway*`, measured by `drawing`).
"""
