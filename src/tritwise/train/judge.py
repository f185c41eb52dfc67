"""What an ARB model can do, in numbers: captions, transcripts and pictures of val, during a run and at its end."""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritwise.data.collections import open_collection
from tritwise.files import atomic_write, make_folder
from tritwise.models import Arb, draw
from tritwise.score.classifier import classes_told, train_classifier
from tritwise.train.config import Config
from tritwise.train.run import RunFolder
from tritwise.train.streams import MediaStream, PictureStream, pictures_in
from tritwise.train.tasks import Records, TextTask
from tritwise.train.telling import NEIGHBOURS, consensus, draws, marks, nearest, neighbours, tell, told_by_trunk

EACH = 4  # pictures of a class in a grid
SHOWN = 12  # examples in a report
MOST = 200  # bytes of a transcript or caption


class Judge:
    """Evaluates the kinds that `streams` has, and `text` if there is one."""

    def __init__(self, config: Config, streams: dict[str, Any], text: TextTask | None) -> None:
        self.config, self.streams, self.text = config, streams, text

    def during(self, model: Arb, folder: RunFolder, where: dict[str, Any], device: torch.device) -> Records:
        """Lines of the kinds "eval", "example" and "picture" for metrics.jsonl; pictures go beside it."""
        records: Records = []
        if self.text is not None:
            records += [record | {"of": "text"} for record in self.text.evaluate(model, folder, where, device)]
        for kind, stream in self.streams.items():
            head = {**where, "split": "val", "of": kind}
            if isinstance(stream, PictureStream):
                records.append({"kind": "eval", **head, "loss": self.picture_loss(model, stream, device)})
                file = f"pictures/{kind}_{where['step']:08d}.npy"
                put_array(folder, file, self.grid(model))
                records.append({"kind": "picture", **head, "file": file, "rows": len(self.config.parts.class_names)})
                continue
            some = stream.features.part("val")[: self.config.media.eval_examples or None]
            told = self.told(model, stream, some, device)
            scores = marks([told[i] for i in some], [stream.features.examples[i].text for i in some])
            loss = self.media_loss(model, stream, some, device)
            records.append({"kind": "eval", **head, "loss": loss, **scores, "examples": len(some)})
            records += self._examples(model, stream, folder, head, device)
        return records

    def _examples(
        self, model: Arb, stream: MediaStream, folder: RunFolder, head: dict[str, Any], device: torch.device
    ) -> Records:
        records: Records = []
        previews = dict(list(stream.features.previews.items())[:SHOWN])
        told = self.told(model, stream, list(previews), device)
        for index, preview in previews.items():
            file = f"pictures/{stream.kind}_{index}.npy"
            if not (folder.path / file).exists():
                put_array(folder, file, preview.numpy())
            example = stream.features.examples[index]
            line = {"name": example.name, "meant": example.text, "told": told[index], "file": file}
            records.append({"kind": "example", **head, **line})
        return records

    def told(
        self,
        model: Arb,
        stream: MediaStream,
        indices: list[int],
        device: torch.device,
        *,
        trunk: bool = False,
    ) -> dict[int, str]:
        """What the model says of these examples, by index: the likeliest symbol each time. trunk: of a sound too,
        whatever its bridge spells."""
        found: dict[int, str] = {}
        fits = [i for i in indices if trunk is False or stream.features.length(i) // stream.stride + 4 <= stream.ctx]
        for part in stream.parts_of(fits):
            x_BFD = torch.stack([stream.features.of(index).float() for index in part]).to(device)
            if trunk:
                with torch.inference_mode():
                    texts = told_by_trunk(model, stream.kind, model.hidden_of(stream.kind, x_BFD), MOST)
            elif stream.kind == "audio" and model.spell is None and x_BFD.shape[1] // stream.stride + 4 > stream.ctx:
                texts = [""] * len(part)  # the stream has no room for the sound
            else:
                texts = tell(model, stream.kind, x_BFD, MOST)
            found |= dict(zip(part, texts, strict=True))
        return found

    def _drawn(
        self, model: Arb, stream: MediaStream, indices: list[int], device: torch.device
    ) -> dict[int, tuple[list[str], list[str]]]:
        """Captions drawn of these images, and those of their neighbours in the train part, by index."""
        found: dict[int, tuple[list[str], list[str]]] = {}
        for part in stream.parts_of(indices):
            x_BFD = torch.stack([stream.features.of(index).float() for index in part])
            own = draws(model, x_BFD.to(device), MOST)
            found |= dict(zip(part, zip(own, neighbours(x_BFD, stream.features), strict=True), strict=True))
        return found

    @torch.inference_mode()
    def media_loss(self, model: Arb, stream: MediaStream, indices: list[int], device: torch.device) -> float:
        """Mean loss over the examples that fit the context."""
        total, count = 0.0, 0
        fits = [index for index in indices if stream.features.length(index) // stream.stride + 4 <= stream.ctx]
        for part in stream.parts_of(fits):
            kind, *tensors = stream.rows(part)
            total += float(model.loss(kind, *(tensor.to(device) for tensor in tensors))) * len(part)
            count += len(part)
        return total / max(1, count)

    @torch.inference_mode()
    def picture_loss(self, model: Arb, stream: PictureStream, device: torch.device) -> float:
        """Loss on 512 pictures at times and with noise that are the same every time."""
        held = PictureStream(stream.pictures[:512], stream.labels[:512], stream.classes, batch=256, seed=1)
        total = 0.0
        for micro in range(2):
            kind, *tensors = held.batch_at(0, micro)
            total += float(model.loss(kind, *(tensor.to(device) for tensor in tensors)))
        return total / 2

    def grid(self, model: Arb) -> np.ndarray:
        """A picture of pictures, a row for each class, uint8 [H, W] or [H, W, 3]."""
        names, media = self.config.parts.class_names, self.config.media
        labels = [label for label in range(len(names)) for _ in range(EACH)]
        assert model.diffusion is not None
        drawn = draw(model.diffusion, labels, steps=media.draw_steps, guidance=media.guidance)
        return tiled(drawn.cpu(), EACH)

    def final(self, model: Arb, folder: RunFolder, device: torch.device) -> dict[str, Any]:
        """Every kind's figures over all of val, beside simple baselines; also writes confusion.json."""
        told: dict[str, Any] = {}
        if self.text is not None:
            where = {"step": 0}
            told["text"] = {
                k: self.text.evaluate(model, folder, where, device)[0][k] for k in ("loss", "bpb", "scored")
            }
        for kind, stream in self.streams.items():
            if isinstance(stream, PictureStream):
                told[kind] = {"loss": self.picture_loss(model, stream, device)} | self.judged(model, stream, device)
            else:
                told[kind] = self._media(model, stream, folder, device)
        return told

    def _media(self, model: Arb, stream: MediaStream, folder: RunFolder, device: torch.device) -> dict[str, Any]:
        features, val = stream.features, stream.features.part("val")
        meant = [features.examples[index].text for index in val]
        drawn = self._drawn(model, stream, val, device) if stream.kind == "vision" else {}
        said = {i: consensus(own) for i, (own, _) in drawn.items()} or self.told(model, stream, val, device)
        result: dict[str, Any] = {"examples": len(val), **marks([said[i] for i in val], meant)}
        if drawn:
            helped = marks([consensus(*drawn[i]) for i in val], meant)
            result["with_neighbours"] = helped | {"neighbours": NEIGHBOURS}
            greedy = self.told(model, stream, val, device)
            result["greedy"] = marks([greedy[i] for i in val], meant)
        result["loss"] = self.media_loss(model, stream, val, device)
        if stream.kind == "audio" and model.spell is not None:
            aloud = self.told(model, stream, val, device, trunk=True)
            texts = [features.examples[index].text for index in aloud]
            result["trunk"] = {"examples": len(aloud), **marks(list(aloud.values()), texts)}
        result["nearest"] = nearest_marks(stream)
        if features.classes:
            folder.write("confusion", confusion(features.classes, meant, [said[i] for i in val]) | {"of": stream.kind})
        return result

    def judged(self, model: Arb, stream: PictureStream, device: torch.device) -> dict[str, Any]:
        """Share of drawn pictures that a classifier takes for what they should be, beside its own share on val."""
        count, names = self.config.media.judge_pictures, self.config.parts.class_names
        if not count or len(names) < 2:
            return {}
        collection = open_collection(self.config.media.place_of("diffusion"), "images")
        seen, meant = pictures_in(collection.first(self.config.media.limit), "val", self.config.parts.channels)
        classifier = train_classifier(stream.pictures.to(device), stream.labels.to(device), len(names))
        own = (classes_told(classifier, seen.to(device)).cpu() == meant).float().mean()
        return recognised(model, classifier, count, self.config) | {"classifier_accuracy": float(own)}


def recognised(model: Arb, classifier: Any, count: int, config: Config) -> dict[str, Any]:
    """How many of `count` drawn pictures, as many of each class, the classifier takes for their class."""
    names, media = config.parts.class_names, config.media
    assert model.diffusion is not None
    labels, right = [place % len(names) for place in range(count)], 0
    for at in range(0, count, 250):
        part = labels[at : at + 250]
        drawn = draw(model.diffusion, part, steps=media.draw_steps, guidance=media.guidance, seed=at + 1)
        right += int((classes_told(classifier, drawn).cpu() == torch.tensor(part)).sum())
    return {"recognised": right / count, "pictures": count, "draw_steps": media.draw_steps, "guidance": media.guidance}


def nearest_marks(stream: MediaStream) -> dict[str, float]:
    """`marks` of telling each val example's nearest neighbour's text: by all features if every example has as many,
    or by their mean, whichever makes fewer faults."""
    features = stream.features
    train, val = features.part("train"), features.part("val")
    meant = [features.examples[index].text for index in val]
    ways: list[Any] = [lambda x_FD: x_FD.mean(dim=0)]
    if len({features.length(index) for index in [*train, *val]}) == 1:
        ways.append(lambda x_FD: x_FD.flatten())
    found = []
    for way in ways:
        known, asked = (torch.stack([way(features.of(i).float()) for i in part]) for part in (train, val))
        told = [features.examples[train[place]].text for (place,) in nearest(asked, known)]
        found.append(marks(told, meant))
    return min(found, key=lambda scores: scores["cer"])


def confusion(names: tuple[str, ...], meant: list[str], told: list[str]) -> dict[str, Any]:
    """counts[i][j]: how often class i was told as j; the last column counts what is no class."""
    counts = [[0] * (len(names) + 1) for _ in names]
    for want, got in zip(meant, told, strict=True):
        counts[names.index(want)][names.index(got) if got in names else len(names)] += 1
    return {"names": list(names), "counts": counts}


def tiled(pictures: Tensor, across: int) -> np.ndarray:
    """uint8 [N, channels, H, W] as one picture with `across` in a row and a line between them."""
    count, channels, height, width = pictures.shape
    down = -(-count // across)
    page = np.full((down * (height + 1) + 1, across * (width + 1) + 1, channels), 128, np.uint8)
    for place, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        top, left = (place // across) * (height + 1) + 1, (place % across) * (width + 1) + 1
        page[top : top + height, left : left + width] = picture
    return page[:, :, 0] if channels == 1 else page


def put_array(folder: RunFolder, file: str, array: np.ndarray) -> None:
    """Write an array into the run folder as .npy, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    make_folder((folder.path / file).parent)
    atomic_write(folder.path / file, buffer.getvalue())
