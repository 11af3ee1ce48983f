"""Ablations: the same training for every variant of a grid and several seeds, and what follows from it.

`cells` trains, `journal` collects, `findings` compares with what a paper says. The others are the codec's: its grid,
how reconstructions are measured, the paper's claims, the page.
"""
