"""Saved transformers models: what Hugging Face writes, and our structure inside those files.

`record` knows the structure, `seals` the files, `saving` and `loading` the folder; `quantizer` is
what transformers calls, and `registration` tells it so. Only `quantizer` imports transformers when
it is imported, and it is imported when transformers has been.
"""
