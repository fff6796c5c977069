"""Training: `python -m train.base` and `python -m train.super_res`, and their parts."""
