"""A LightningModule with its DataModule, and a Hugging Face model with a data set, are problems as they are."""

import itertools
from typing import Any

import lightning
import pytest
import torch
import torchmetrics
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metaopt
from metaopt.errors import ProblemError
from metaopt.lab import train

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


class Data(lightning.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.parts = {
            stage: slice(*ends) for stage, ends in (("train", (0, 24)), ("val", (24, 40)), ("test", (40, 48)))
        }

    def _loader(self, part: str, **options: Any) -> Any:
        return DataLoader(TensorDataset(X[self.parts[part]], Y[self.parts[part]]), 6, **options)

    def train_dataloader(self) -> Any:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(2, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        outputs = self.net(batch[0])
        self.accuracy(outputs, batch[1])
        self.log("val_loss", nn.functional.cross_entropy(outputs, batch[1]))
        self.log_dict({"val_acc": self.accuracy, "val/count": float(len(batch[1]))})

    def on_validation_epoch_end(self) -> None:
        self.log("val_seen", float(self.accuracy.update_count))


def test_a_lightning_module_with_its_data_module_is_a_problem() -> None:
    problem = metaopt.problem(model=Classifier, batches=Data, targets={"acc": 0.8})
    model = problem.model(0)
    batch = next(problem.batches(0))
    assert problem.loss(model, batch).item() == nn.functional.cross_entropy(model.net(batch[0]), batch[1]).item()
    for split, part in (("validation", slice(24, 40)), ("test", slice(40, 48))):
        outputs = model.net(X[part])
        found = problem.evaluate(model, split)
        assert found["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, Y[part]).item(), rel=1e-6)
        assert found["acc"] == pytest.approx((outputs.argmax(-1) == Y[part]).float().mean().item())
        assert found["seen"] == {"validation": 3, "test": 2}[split]
        assert set(found) == {"loss", "acc", "count", "seen"}
        assert problem.evaluate(model, split) == found
    assert train(problem, "adamw(lr=0.05)", steps=40).evaluation["acc"] > 0.8


def test_the_batches_of_a_data_module_depend_on_seed_and_number() -> None:
    problem = metaopt.problem(model=Classifier, batches=lambda: Data())
    first = list(itertools.islice(problem.batches(1), 8))
    torch.testing.assert_close(next(problem.batches(1, start=6)), first[6], rtol=0, atol=0)
    assert not torch.equal(next(problem.batches(2))[0], first[0][0])


def test_a_module_that_optimizes_by_hand_or_has_no_validation_is_told() -> None:
    class ByHand(Classifier):
        automatic_optimization = False

    with pytest.raises(ProblemError, match="steps its optimizers itself"):
        metaopt.problem(model=ByHand, batches=Data).model(0)
    with pytest.raises(ProblemError, match="validation is missing"):
        next(metaopt.problem(model=Classifier, batches=lambda: [1]).batches(0))


class Sequences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows as a tokenizer and `datasets` give them: lists of numbers and a label."""

    def __init__(self, first: int, end: int) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 12, (60, 6), generator=generator)
        self.rows = [
            {"input_ids": row.tolist(), "attention_mask": [1] * 6, "label": int(row[0] > 7)} for row in ids[first:end]
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    return transformers.BertForSequenceClassification(config)


def accuracy(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(**batch).logits.argmax(-1) == batch["labels"]).float().mean()


def test_a_hugging_face_model_with_a_data_set_is_a_problem() -> None:
    problem = metaopt.problem(
        model=bert,
        batches=Sequences(0, 40),
        validation=Sequences(40, 60),
        batch_size=8,
        metrics={"accuracy": accuracy},
    )
    model = problem.model(0)
    batch = next(problem.batches(0))
    assert batch["input_ids"].shape == (8, 6) and batch["labels"].shape == (8,)
    model.eval()
    assert problem.loss(model, batch).item() == pytest.approx(
        nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).item()
    )
    result = train(problem, "adamw(lr=1e-2)", steps=60)
    assert result.evaluation["accuracy"] > 0.7
