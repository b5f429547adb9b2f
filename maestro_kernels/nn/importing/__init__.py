"""Factors that others made: `sources` reads files, `naming` knows formats, `factors` builds layers.

`adapters` is the format of PEFT, whose factors are added to a weight instead of replacing it.
"""
