"""What a cascade learned, in numbers: pure functions of images, and the networks they need.

composition.py judges images of the captions of `imagen_jax.data.scenes` and needs no network.
"""
