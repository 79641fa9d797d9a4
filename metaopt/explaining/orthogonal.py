"""What `metaopt.explain` says of layers that do not suit a base: embeddings and heads with orthogonal updates."""

from collections.abc import Iterator

import torch

from metaopt.explaining.practice import chains_of
from metaopt.explaining.probing import Characters
from metaopt.explaining.table import Finding, some

# the name of the module that a parameter belongs to, in models of others
EMBEDDINGS = ("wte", "wpe", "tok_emb", "pos_emb", "token_embedding", "position_embedding")
HEADS = ("head", "lm_head", "classifier", "score", "embed_out", "unembed", "output_projection")


def on_layers(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module | None,
    names: dict[int, str],
    characters: Characters,
) -> Iterator[Finding]:
    """Find embeddings and output layers whose updates a base makes orthogonal, as Muon does; arXiv:2502.16982.

    They are known by the model's modules, or by their names if there is no model.
    """
    known = {} if model is None else _ends_of(model)
    for chain in chains_of(optimizer):
        found = []
        for entry in chain.groups_in(optimizer.param_groups):
            ends = [p for p in entry["params"] if p.dim() == 2 and (id(p) in known or _sounds_like(names[id(p)]))]
            character = characters.of(chain, entry) if ends else None
            if character is not None and character.orthogonalizes:
                found += [names[id(p)] for p in ends]
        if found:
            pattern = found[0].rpartition(".")[0] or found[0]
            base = type(chain.base).__name__
            yield Finding(
                "embedding-or-head",
                f"{base} makes updates orthogonal, which suits hidden matrices, but not embeddings and output layers: "
                f"{some(found)}",
                f"give these to another base: partition({{'{pattern}.*': adamw(lr=3e-4), ..., 'matrix': "
                f"{base.lower()}(...), '*': adamw(lr=3e-4)}})",
            )


def _ends_of(model: torch.nn.Module) -> set[int]:
    """Return the weights of embeddings, and of linear layers with an output for every row of one, by identity."""
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag)]
    sizes = {m.num_embeddings for m in embeddings}
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features in sizes]
    return {id(m.weight) for m in (*embeddings, *heads)}


def _sounds_like(name: str) -> bool:
    module = name.split(".")[-2] if "." in name else name
    return module in HEADS or module in EMBEDDINGS or module.startswith("embed")
