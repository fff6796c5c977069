"""What wrappers add to the names in a state dict: DataParallel, torch.compile, Lightning.

module.unets.0.final_conv.weight                DataParallel and DistributedDataParallel
unets.0._orig_mod.final_conv.weight             torch.compile, of all or of a part
{"state_dict": {"imagen.unets.0...": ...}}      Lightning, under the attribute's name
"""

import re
from collections.abc import Mapping
from typing import Any

from imagen_jax.errors import UserError

PARTS = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")  # no module of the reference has these names
CASCADE = re.compile(r"(?P<prefix>(.+\.)?)unets\.0\.")
UNET = re.compile(r"(?P<prefix>(.+\.)?)final_conv\.weight")


def remove(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A file's content with the reference's names of tensors, and a note for each change. Raises
    UserError if two tensors get the same name.

    Other tensors than the cascade's, of a Lightning module with more, are left out and counted.
    """
    notes = []
    if "state_dict" in data and data.keys() != {"config", "state_dict"} and "model" not in data:
        others = [name for name in data if name != "state_dict"]
        notes.append("read: state_dict." + (f" Not read: {', '.join(others)}." if others else ""))
        data = data["state_dict"] if isinstance(data["state_dict"], dict) else data
    if "model" in data or "state_dict" in data:
        parts = ("model", "state_dict", "ema")
        nested = {name: data[name] for name in parts if isinstance(data.get(name), dict)}
        return dict(data) | {name: _plain(part, notes) for name, part in nested.items()}, notes
    return _plain(data, notes), notes


def _plain(state: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    if not all(isinstance(name, str) for name in state):
        return dict(state)  # refused later, by its type
    found = {part for name in state for _, part in PARTS.findall(name)}
    renamed = {name: PARTS.sub("", name) for name in state}
    if len(set(renamed.values())) < len(state):
        raise UserError(f"two tensors have the same name without {' and '.join(sorted(found))}.")
    plain = {renamed[name]: value for name, value in state.items()}
    matches = map(CASCADE.match, plain)
    prefix = next((match["prefix"] for match in matches if match), None)
    if prefix is None and not any(name.startswith(("unets.", "0.")) for name in plain):
        matches = map(UNET.fullmatch, plain)
        prefix = next((match["prefix"] for match in matches if match), None)
    notes += [f"{part!r} is removed from the names of tensors." for part in sorted(found)]
    if not prefix:
        return plain
    others = [name for name in plain if not name.startswith(prefix)]
    if others:
        notes.append(f"not read: {len(others)} tensors outside {prefix!r}, such as {others[0]}.")
    notes.append(f"{prefix!r} is removed from the names of tensors.")
    return {
        name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)
    }
