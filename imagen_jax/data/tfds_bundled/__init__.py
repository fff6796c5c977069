"""The bundled pictures as a tensorflow-datasets set, made and read without TensorFlow.

    python -m imagen_jax.data.tfds_bundled --data-dir DIR
    TFDS_DATA_DIR=DIR python -m train.base --data tfds:imagen_bundled

It is the pattern for a set of one's own: a builder in an importable module (not in the script that
runs), giving pictures as bytes. Splits: train and heldout.
"""
