"""`Sample`: what every task's reader yields, and what prompts, training and scores read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PromptStyle = Literal["papers", "published"]  # whose wording a prompt has: the papers', or the published code's roles


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a sample.

    Attributes:
        path: file path relative to the data root, with forward slashes.
        sha256: hex digest of the file's bytes; empty until `sweep.draw` has read the file.
    """

    path: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question (or caption request) with its images and references.

    Attributes:
        task: name of the task that read it.
        sample_id: the official id, in its official type (VQA integers, MME strings).
        images: at least one image.
        question: None for captioning.
        target: the text a training step should produce (the most frequent answer, ties to the first; the
            first caption).
        references: what the scorer compares with: ten answers, five or more captions, one letter.
        meta: JSON-able extras that a prompt or a scorer reads (answer_type, choices, category, ...).
        demonstration: the answer shown in a demonstration, where it is not the target.
    """

    task: str
    sample_id: int | str
    images: tuple[ImageRef, ...]
    question: str | None
    target: str
    references: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    demonstration: str | None = None

    @property
    def shown(self) -> str:
        """The answer that a prompt shows where this sample is a demonstration."""
        return self.target if self.demonstration is None else self.demonstration

    def to_json(self) -> dict[str, object]:
        """Return the manifest's record of this sample."""
        # field by field: `dataclasses.asdict` copies deeply, which is most of what reading a manifest takes
        record: dict[str, object] = {
            "task": self.task,
            "sample_id": self.sample_id,
            "images": [{"path": image.path, "sha256": image.sha256} for image in self.images],
            "question": self.question,
            "target": self.target,
            "references": self.references,
            "meta": self.meta,
        }
        if self.demonstration is not None:  # left out, so that manifests drawn before the field have the same digest
            record["demonstration"] = self.demonstration
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Sample:
        """Rebuild a sample from a manifest's record."""
        return cls(
            task=record["task"],
            sample_id=record["sample_id"],
            images=tuple(ImageRef(**image) for image in record["images"]),
            question=record["question"],
            target=record["target"],
            references=tuple(record["references"]),
            meta=record["meta"],
            demonstration=record.get("demonstration"),
        )
