"""The models: one skeleton (rwkv.py) and one file of equations per generation (dove.py, eagle.py, finch.py)."""
