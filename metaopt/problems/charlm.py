"""A small character-level transformer on real English text that every CPython carries."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from metaopt import Problem, hookimpl, hyper


class CharTransformer(nn.Module):
    """A causal transformer: embeddings, pre-norm blocks, one output per position."""

    def __init__(self, characters: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        length = text.shape[1]
        hidden = self.token(text) + self.position.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        logits: torch.Tensor = self.head(self.norm(self.blocks(hidden, mask=mask, is_causal=True)))
        return logits


class CharLM(Problem):
    """The next character of CPython's own help texts (pydoc_data.topics), split by topic: 80% to train, 10%, 10%."""

    targets = {"loss": 2.2}
    default_steps = 300
    batch_size: int = hyper(16, ge=1, doc="windows in a batch")
    context: int = hyper(64, ge=2, doc="characters in a window")
    width: int = hyper(64, ge=4, doc="width of the transformer; a multiple of 4")
    layers: int = hyper(2, ge=1, doc="number of blocks")

    def _texts(self) -> dict[str, str]:
        from pydoc_data.topics import topics

        splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        for number, name in enumerate(sorted(topics)):
            split = {8: "validation", 9: "test"}.get(number % 10, "train")
            splits[split].append(topics[name])
        return {split: "\n".join(texts) for split, texts in splits.items()}

    def _encoded(self) -> dict[str, torch.Tensor]:
        if not hasattr(self, "_data"):
            texts = self._texts()
            # 0 stands for characters that the training text lacks
            self._alphabet = {c: i for i, c in enumerate(sorted(set(texts["train"])), start=1)}
            self._data = {
                split: torch.tensor([self._alphabet.get(c, 0) for c in text]) for split, text in texts.items()
            }
        return self._data

    def model(self, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        self._encoded()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return CharTransformer(len(self._alphabet) + 1, self.width, self.layers, self.context).to(device)

    def batches(self, seed: int, device: torch.device | str = "cpu", start: int = 0) -> Iterator[torch.Tensor]:
        data, number = self._encoded()["train"], start
        while True:
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + number)
            begins = torch.randint(len(data) - self.context, (self.batch_size,), generator=generator)
            yield torch.stack([data[b : b + self.context + 1] for b in begins.tolist()]).to(device)
            number += 1

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "validation") -> dict[str, float]:
        data = self._encoded()[split]
        # windows spread over the whole text, the same for everyone
        count = min(64, len(data) // (self.context + 1))
        begins = [i * (len(data) - self.context - 1) // max(1, count - 1) for i in range(count)]
        windows = torch.stack([data[b : b + self.context + 1] for b in begins])
        return {"loss": float(self.loss(model, windows.to(next(model.parameters()).device)))}

    def data_hash(self) -> str:
        texts = self._texts()
        return hashlib.sha256("\0".join(texts[split] for split in sorted(texts)).encode()).hexdigest()


@hookimpl
def metaopt_problems() -> dict[str, type[Problem]]:
    return {"charlm": CharLM}
