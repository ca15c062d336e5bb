"""What stays in a process between trials: the frozen backbone, its compiled parts, image features, prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from pipeline import backbones
from pipeline.backbones.base import Pixels
from pipeline.backbones.decoder import Forwards
from pipeline.backbones.load import Zero
from pipeline.config.load import BackboneSource, TrialRequest
from pipeline.config.trial import Kind, TrialConfig
from pipeline.core import machine
from pipeline.core.errors import InputError
from pipeline.data.manifest import Manifest
from pipeline.data.sample import Sample
from pipeline.prompts.collate import Batch, TrainedSpan, collate
from pipeline.prompts.prompt import Encoded, ImageSizes, Rendered, encode_all, render, sizes_that_matter
from pipeline.resident.visual_tokens import DiskStore, Recent, VisualTokens
from pipeline.tasks import of_manifest

if TYPE_CHECKING:
    from pipeline.backbones.load import Loaded

TEACHER_BYTES = 1 << 30  # of a teacher's targets: computed ahead, and kept at least for trials with its demonstrations
PROMPTS_ALONE = 50_000  # kept; a few kilobytes each
_DISK_BYTES = 1 << 30  # of the images' features


@dataclass(frozen=True)
class Target:
    """What one sample's student is compared with.

    Attributes:
        hidden: hidden states of the last m tokens (query and answer) by layer, [L, m, D]; None for logits.
        logits: of the answer tokens, [n, V]; None for hidden states.
    """

    hidden: Tensor | None
    logits: Tensor | None

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.logits) if t is not None)


class Resident:
    """One backbone in memory, with everything computed from it that trials share.

    Args:
        config: a trial's; its backbone, precision and quantization decide what is loaded.
        source: where the weights lie.
        cache: folder of visual tokens, or None.
        device: where the model goes.
    """

    def __init__(self, config: TrialConfig, source: BackboneSource, cache: Path | None, device: str) -> None:
        zero = self._zero(config)
        self.loaded = backbones.load_from(
            config.backbone, source, dtype=config.precision, device=device, quantized=config.quantize, zero=zero
        )
        if self.loaded.digest != config.backbone_digest:
            raise InputError(
                f"the weights (digest {self.loaded.digest[:12]}) are not the trial's ({config.backbone_digest[:12]})",
                where=config.backbone,
                way_out="Put the old weights back, or run the sweep again for the new ones",
            )
        self.device, self.key = device, self.key_of(config)
        self.forwards: Forwards = {}  # compiled ones, of the decoder's frozen parts
        self.visual = VisualTokens(self.loaded, cache)
        # by micro-batch: whoever finds one finds it whole, made in a pass of the same shape, so that a trial's numbers
        # do not depend on the trials that were here before it
        # a trial that began an epoch later finds the last epoch's, where the memory is the machine's and not a card's
        kept = max(TEACHER_BYTES, machine.free_memory() // 8) if device == "cpu" else TEACHER_BYTES
        self.targets: Recent[tuple, list[Target]] = Recent(kept, lambda made: sum(target.bytes for target in made))
        self.kinds: set[Kind] = set()  # of target that are made in one pass: those that are asked for soon
        self._manifests: dict[Path, Manifest] = {}
        # by all that their tokens come from: splits and manifests may give one id to different samples
        self._alone: Recent[tuple[Rendered, ImageSizes], Encoded] = Recent(PROMPTS_ALONE, lambda _: 1)

    @classmethod
    def key_of(cls, config: TrialConfig) -> tuple[object, ...]:
        """What must be equal for two trials to share a resident backbone."""
        return *config.resident, cls._zero(config)

    @staticmethod
    def _zero(config: TrialConfig) -> Zero | None:
        """Return how a trial's ranks have the backbone in parts; whoever is in no group, to answer, has it whole."""
        return Zero(config.offload) if config.zero_stage == 3 and torch.distributed.is_initialized() else None

    def manifest(self, request: TrialRequest) -> Manifest:
        """Return the manifest of a trial's task, or of the one that it is scored on, read once.

        Raises:
            InputError: it is not the one that the trial, or its score, was made for.
        """
        path, digest = Path(request.manifest), request.manifest_digest or request.config.manifest_digest
        if path not in self._manifests or self._manifests[path].digest != digest:
            manifest = Manifest.load(path)
            way_out = "Draw the old sample again, or run the sweep again for the new one"
            manifest.check_digest(digest, where=path, way_out=way_out)
            self._manifests[path] = manifest
        return self._manifests[path]

    def alone(self, manifest: Manifest, samples: Sequence[Sample], *, answer: bool) -> list[Encoded]:
        """Return the samples' prompts without demonstrations, tokenised once; in training the answer follows."""
        rendered = self._rendered(manifest, samples, [()] * len(samples), answer)
        keys = list(zip(rendered, sizes_that_matter(self.loaded, rendered, manifest.image_root), strict=True))
        prompts = {key: encoded for key in keys if (encoded := self._alone.get(key)) is not None}
        missing = list(dict.fromkeys(key for key in keys if key not in prompts))
        made = encode_all(self.loaded, [text for text, _ in missing], image_sizes=[sizes for _, sizes in missing])
        for key, encoded in zip(missing, made, strict=True):
            prompts[key] = self._alone.put(key, encoded)
        return [prompts[key] for key in keys]

    def prompts(
        self, manifest: Manifest, queries: Sequence[Sample], demos: Sequence[Sequence[Sample]], *, answer: bool
    ) -> list[Encoded]:
        """Return prompts with demonstrations."""
        return encode_all(self.loaded, self._rendered(manifest, queries, demos, answer), root=manifest.image_root)

    def _rendered(
        self, manifest: Manifest, queries: Sequence[Sample], demos: Sequence[Sequence[Sample]], answer: bool
    ) -> list[Rendered]:
        task = of_manifest(manifest)
        return [
            render(task.template_for(query), self.loaded.backbone, query, shots, answer=answer, style=manifest.prompt)
            for query, shots in zip(queries, demos, strict=True)
        ]

    def batch(
        self, encoded: Sequence[Encoded], manifest: Manifest | Sequence[Manifest], *,
        span: TrainedSpan | Sequence[TrainedSpan] = "answer", pixels: bool = False,
        side: Literal["left", "right"] = "right",
    ) -> Batch:  # fmt: skip
        """Return a padded batch on the device, with cached visual tokens or, where vision is trained, pixels.

        Args:
            encoded: the rows.
            manifest: of all rows, or one a row.
            span: which tokens are trained, for all rows or one a row.
            pixels: give the vision tower pixels.
            side: where rows are padded.
        """
        if isinstance(manifest, Manifest):
            root, images = str(manifest.image_root), [e.images for e in encoded]
        else:  # images of several roots: name them in full
            root = ""
            images = [
                tuple(replace(image, path=str(Path(m.image_root, image.path))) for image in e.images)
                for e, m in zip(encoded, manifest, strict=True)
            ]
        batch = collate(
            encoded,
            self.loaded,
            side=side,
            span=span,
            visual=None if pixels else self.visual.get([image for row in images for image in row], root),
            pixels=self.visual.pixels(images, root) if pixels else None,
        )
        return batch.to(self.device)


class ImageFeatures(VisualTokens):
    """One vector [D_v] an image: the vision tower's last hidden state, averaged over its positions.

    Looked up and kept as visual tokens are, in a store of its own.

    Args:
        loaded: the backbone.
        folder: of the store, shared by any number of processes; None: memory only.
    """

    def __init__(self, loaded: Loaded, folder: Path | None) -> None:
        super().__init__(loaded, disk_bytes=_DISK_BYTES)
        self.disk = None if folder is None else DiskStore(folder, _DISK_BYTES)
        if not loaded.backbone.modules.vision:
            raise InputError(f"{loaded.backbone.name} reads no pictures", way_out="Choose demonstrations by their text")
        self._tower: nn.Module = loaded.model.get_submodule(loaded.backbone.modules.vision)

    @override
    @torch.no_grad()
    def _encode(self, group: Sequence[tuple[str, Pixels]]) -> list[tuple[str, Tensor]]:
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(getattr(output, "last_hidden_state", output if isinstance(output, Tensor) else output[0]))

        handle = self._tower.register_forward_hook(keep)
        try:
            super()._encode(group)
        finally:
            handle.remove()
        # Pictures of a group have one shape, so each has the same share of the tower's rows (tiles, patches), in order.
        states = torch.cat([state.flatten(0, -2) for state in seen]).float()
        pooled = states.unflatten(0, (len(group), -1)).mean(1).cpu()
        return [(key, vector.clone()) for (key, _), vector in zip(group, pooled, strict=True)]


_HELD: WeakKeyDictionary[VisualTokens, ImageFeatures] = WeakKeyDictionary()


def image_features(visual: VisualTokens) -> ImageFeatures:
    """Return the features that go with a backbone's visual tokens: one object a process, its store beside theirs."""
    if visual not in _HELD:
        folder = None
        if visual.disk is not None:
            name = hashlib.sha256(f"{visual.settings}:pooled".encode()).hexdigest()[:16]
            folder = visual.disk.folder.parent / name
        _HELD[visual] = ImageFeatures(visual.loaded, folder)
    return _HELD[visual]
