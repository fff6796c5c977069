"""The bundled pictures as a tensorflow-datasets set, made and read without TensorFlow.

    python -m imagen_jax.data.tfds_bundled --data-dir DIR
    TFDS_DATA_DIR=DIR python -m train.base --data tfds:imagen_bundled

Use it as a template for your own set: a builder in an importable module (not in the script that
runs) that yields pictures as bytes. Splits: train and heldout.
"""
