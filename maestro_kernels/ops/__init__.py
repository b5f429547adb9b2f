"""From a call to a backend: run.py is the way in.

Around it stand eager.py (what watches a call), gradient.py (the one gradient) and registered.py
(the ops that torch's machinery sees).
"""
