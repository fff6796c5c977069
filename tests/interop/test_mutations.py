"""`verify` sees every mistake a conversion could make: two tensors swapped, a kernel transposed.

Of all swaps of same-shaped tensors and transpositions of square kernels of a small U-Net, no weight
at its initial value, a sample is tried. (a), the inverse table, must see each. (b), the forward,
must see all but those that change no output, CANNOT_MATTER, which must go unseen.
"""

import itertools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import nn
from imagen_jax.config import UnetConfig
from imagen_jax.interop import keys, verify
from tests import parity

SMALL = dict(
    dim=8,
    dim_mults=(1, 2),
    attn_dim_head=4,
    attn_heads=2,
    cond_dim=8,
    text_embed_dim=6,
    max_text_len=5,
    attn_pool_num_latents=3,
    layer_attns=(False, True),
    layer_cross_attns=(False, True),
)
CONFIG = UnetConfig(
    **SMALL | dict(dim_mults=(1,), layer_attns=True, layer_cross_attns=True),
    lowres_cond=True,
    memory_efficient=True,
)
TRIED = 60  # swaps, besides every transposition and those that cannot matter
CANNOT_MATTER = (
    (r"(.*)qk_norm.k_scale", r"(.*)qk_norm.q_scale"),  # their product scales each logit's terms
    (r".*gca.to_k.bias()", r".*gca.to_k.bias()"),  # a softmax is blind to a constant
    (r"(.*)after.point.bias", r"(.*)after.wide.bias"),  # summed, as the following are
    (r"(.*init_block.)block2.project.bias", r"(.*init_block.)res_conv.bias"),
    (r"()lowres_time.to_cond.bias", r"()time.to_cond.bias"),
)


@pytest.fixture(scope="module")
def converted():
    """(the reference's tensors, ours by dotted name, the structure of the tree)."""
    state = parity.state_dict(parity.reference_unet(CONFIG))
    params = keys.to_jax(state, nn.abstract(CONFIG)[1])
    return state, keys.flatten(params), jax.tree.structure(params)


def mutations(leaves) -> list[tuple[str, ...]]:
    """The names of every two leaves to swap, and of every square kernel to transpose."""
    swaps = [
        (a, b)
        for a, b in itertools.combinations(leaves, 2)
        if leaves[a].shape == leaves[b].shape and not np.array_equal(leaves[a], leaves[b])
    ]
    square = [a for a, x in leaves.items() if x.ndim >= 2 and x.shape[-1] == x.shape[-2]]
    return swaps + [(name,) for name in square]


def mutate(leaves, names: tuple[str, ...]):
    if len(names) == 1:
        return leaves | {names[0]: leaves[names[0]].swapaxes(-1, -2)}
    return leaves | {names[0]: leaves[names[1]], names[1]: leaves[names[0]]}


def test_the_inverse_table_sees_mutations(converted):
    state, leaves, structure = converted
    theirs = {ours: their for their, ours in pairs_of_names(state, leaves, structure)}
    tried = mutations(leaves)
    assert len(tried) > 500
    for names in random.Random(0).sample(tried, 2 * TRIED):
        found = verify.differing(state, structure.unflatten(mutate(leaves, names).values()))
        assert sorted(found) == sorted(theirs[n] for n in names)


def test_the_forward_sees_what_can_matter(converted):
    state, leaves, structure = converted
    reference = verify.reference_outputs(CONFIG, state)

    def agrees(leaves) -> bool:
        ours = verify.outputs(CONFIG, structure.unflatten(leaves.values()))
        return max(verify.compare(reference, ours)) <= verify.TOLERANCE

    every = mutations(leaves)
    tried = [names for names in every if len(names) == 1 or cannot_matter(names)]
    assert len(tried) > 20
    tried += random.Random(0).sample([names for names in every if names not in tried], TRIED)
    leaves = {ours: jnp.asarray(leaf) for ours, leaf in leaves.items()}
    assert agrees(leaves)
    unseen = {names for names in tried if agrees(mutate(leaves, names))}
    assert unseen == {names for names in tried if cannot_matter(names)}


def cannot_matter(names: tuple[str, ...]) -> bool:
    """Whether these two are a pair of CANNOT_MATTER, of the same place."""
    if len(names) == 1:
        return False
    for patterns in CANNOT_MATTER:
        places = [re.fullmatch(p, n) for p, n in zip(patterns, sorted(names), strict=True)]
        if all(places) and places[0][1] == places[1][1]:
            return True
    return False


def pairs_of_names(state, leaves, structure):
    """(theirs, ours) of every tensor, by telling the tensors apart by a number in each."""
    numbered = {ours: np.full(leaf.shape, i) for i, (ours, leaf) in enumerate(leaves.items())}
    back = keys.to_torch(structure.unflatten(numbered.values()))
    names = list(leaves)
    return [(theirs, names[array.flat[0]]) for theirs, array in back.items()]
