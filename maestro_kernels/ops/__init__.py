"""The torch.library boundary: schemas, fakes, gradients, autocast, vmap, FLOP formulas.

`linear.py` holds the op of one layer, `grouped.py` that of a group, `eager.py` tells when the
short eager path may call a backend directly. All run the same plan.
"""
