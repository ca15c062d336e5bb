"""Zero-shot, random demonstrations (in-context learning), and those with the most similar images or texts (RICES)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from pipeline.adapters.options import PublishedDecoding
from pipeline.baselines import Baseline, BaselineOptions, Setting, baselines
from pipeline.core.errors import InputError
from pipeline.data.sample import Sample
from pipeline.prompts.prompt import draw_demos


@baselines.register
class ZeroShot(Baseline):
    """No demonstrations, the frozen model as it is."""

    name = "zero-shot"


class IclOptions(BaselineOptions):
    """How many demonstrations, and whether every query has its own.

    Fixed ones are computed once for all queries: their keys and values are kept (`pipeline.evaluate.generate`).
    """

    num_shots: int = Field(8, ge=1)
    demonstrations: Literal["per-query", "fixed"] = "per-query"


@baselines.register
class RandomDemonstrations(Baseline):
    """k demonstrations from the training pool, uniformly without replacement."""

    name = "icl-k"
    Options: ClassVar[type[BaselineOptions]] = IclOptions
    shows_demonstrations = True
    options: IclOptions

    def demonstrations(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """Return `num_shots` samples of the pool for every query, by seed and query or by the seed alone."""
        if self.options.demonstrations == "fixed":
            return fixed(self.setting.pool, queries, self.options.num_shots, self.setting.seed)
        return [draw_from(self.setting.pool, query, self.options.num_shots, self.setting.seed) for query in queries]


class ShuffledOptions(IclOptions):
    """How many demonstrations; one alone has no other's image to show."""

    num_shots: int = Field(8, ge=2)


@baselines.register
class ShuffledImages(RandomDemonstrations):
    """The demonstrations of `icl-k`, each with the images of the one after it, the last with the first one's.

    Texts stay as they are, so what is lost against `icl-k` came from looking at the demonstrations' images: multimodal
    in-context learning, where text alone would lose nothing (TrueMICL, Chen et al. 2025, arXiv 2507.15807).
    """

    name = "icl-k-shuffled"
    Options: ClassVar[type[BaselineOptions]] = ShuffledOptions

    def fit(self, setting: Setting) -> None:
        """Look for images.

        Raises:
            InputError: the pool's samples have none.
        """
        super().fit(setting)
        if not any(sample.images for sample in setting.pool):
            problem = "the samples have no images to shuffle"
            raise InputError(problem, where=f"method '{self.name}'", way_out="Use icl-k")

    def demonstrations(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """Return what `icl-k` draws, the images moved on by one demonstration."""
        return [
            [replace(sample, images=later.images) for sample, later in zip(shown, [*shown[1:], shown[0]], strict=True)]
            for shown in super().demonstrations(queries)
        ]


def draw_from(pool: Sequence[Sample], query: Sample, num_shots: int, seed: int, *, draw: int | str = 0) -> list[Sample]:
    """Return `num_shots` samples of the pool for one query, never the query itself; see `draw_demos`."""
    by_id = {sample.sample_id: sample for sample in pool}
    return [by_id[i] for i in draw_demos(list(by_id), query.sample_id, num_shots, seed, draw=draw)]


def fixed(pool: Sequence[Sample], queries: Sequence[Sample], num_shots: int, seed: int) -> list[list[Sample]]:
    """Return the same `num_shots` samples of the pool for every query; one that is among the queries is not drawn."""
    asked = {query.sample_id for query in queries}
    by_id = {sample.sample_id: sample for sample in pool if sample.sample_id not in asked}
    drawn = [by_id[i] for i in draw_demos(list(by_id), "every query", num_shots, seed)]
    return [drawn for _ in queries]


class RicesOptions(BaselineOptions):
    """How many demonstrations."""

    num_shots: int = Field(8, ge=1)


@baselines.register
class SimilarImages(Baseline):
    """The k training images nearest to the query's by cosine distance, the nearest last, right before the query.

    Features are the vision tower's last hidden state, averaged over its positions (and over a sample's images). Two
    questions about one image are one entry of the index, the earlier in the pool, so that k demonstrations show k
    images. An image that the query itself shows is never among them.

    Samples without images are compared by their text in the same way: features are counts of its runs of two to five
    letters within words, weighted by tf-idf over the pool (1 + ln of the count), so that "cry" is near "try" too.
    """

    name = "rices-k"
    Options: ClassVar[type[BaselineOptions]] = RicesOptions
    shows_demonstrations = True
    options: RicesOptions

    def fit(self, setting: Setting) -> None:
        """Build the exact index over the pool's images."""
        from sklearn.neighbors import NearestNeighbors  # a second of import that the other methods need not pay

        super().fit(setting)
        entries: dict[tuple[str, ...], Sample] = {}
        for sample in setting.pool:
            entries.setdefault(_shown(sample), sample)
        self.entries = list(entries.values())
        self.by_text = self._by_text() if not any(sample.images for sample in setting.pool) else None
        self.index = NearestNeighbors(algorithm="brute", metric="cosine").fit(self._features(self.entries))

    def demonstrations(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """Return `num_shots` samples of the pool for every query, by falling distance.

        Raises:
            InputError: the pool has too few images beside a query's own.
        """
        if not queries:
            return []
        neighbours = self.index.kneighbors(self._features(queries), n_neighbors=len(self.entries))
        return [self._nearest(*row) for row in zip(queries, *neighbours, strict=True)]

    def _by_text(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        features = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        return features.fit([sample.question or "" for sample in self.entries])

    def _nearest(self, query: Sample, distances: Any, indices: Any) -> list[Sample]:
        shown = set(_shown(query))
        # of two images at one distance the earlier in the pool is the nearer, on every machine
        order = indices[np.lexsort((indices, distances))]
        free = [self.entries[i] for i in order if shown.isdisjoint(_shown(self.entries[i]))]
        free = [sample for sample in free if sample.sample_id != query.sample_id]
        if len(free) < self.options.num_shots:
            raise InputError(
                f"{self.options.num_shots} demonstrations are asked for, the pool has {len(free)} "
                f"{'texts' if self.by_text else 'images'} beside the query's",
                where="num_shots",
                way_out="Use fewer demonstrations or a larger pool (num_train_samples)",
            )
        return free[: self.options.num_shots][::-1]

    def _features(self, samples: Sequence[Sample]) -> Any:
        if self.by_text is not None:
            return self.by_text.transform([sample.question or "" for sample in samples])
        features: Tensor = self.setting.features([image for sample in samples for image in sample.images])
        parts = features.double().split([len(sample.images) for sample in samples])
        return np.stack([part.mean(0).numpy() for part in parts])


class ParallelOptions(RicesOptions):
    """How many demonstrations, in how many chunks, and how evenly these are weighed."""

    published_decoding: ClassVar[PublishedDecoding] = PublishedDecoding(num_beams=1)
    num_chunks: int = Field(2, ge=1)
    temperature: float = Field(1.0, gt=0)


@baselines.register
class ParallelDemonstrations(SimilarImages):
    """p(y) ~ prod_c p(y | chunk c, query)^w_c, over chunks of k random demonstrations (Parallel-ICL, Yamaguchi 2026).

    A product of experts, token by token, greedily: each chunk stands before the query in a prompt of its own, so that
    attention never spans them all. As the abstract of arXiv 2603.16092 has it, chunks are clusters of the
    demonstrations (k-means on features of unit length), and w = softmax_c of the cosine between the query's features
    and the mean of the chunk's, over `temperature`. Features are those of rices-k: of images, or of texts.
    """

    name = "parallel-icl"
    in_chunks = True
    Options: ClassVar[type[BaselineOptions]] = ParallelOptions
    options: ParallelOptions

    def demonstrations(self, queries: Sequence[Sample]) -> list[list[Sample]]:
        """Return `num_shots` samples of the pool for every query, as icl-k draws them."""
        return [draw_from(self.setting.pool, query, self.options.num_shots, self.setting.seed) for query in queries]

    def chunks(self, query: Sample) -> list[tuple[float, list[Sample]]]:
        """Return the query's demonstrations by cluster, with weights; a cluster without any has the weight 0."""
        from sklearn.cluster import KMeans

        (demos,), number = self.demonstrations([query]), self.options.num_chunks
        features = self._features([*demos, query])
        features = np.asarray(features.todense() if hasattr(features, "todense") else features)
        features = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
        clusters = min(number, len(np.unique(features[:-1], axis=0)))
        labels = KMeans(clusters, n_init=1, random_state=self.setting.seed).fit_predict(features[:-1])
        cosines = np.full(number, -np.inf)
        for label in set(labels):
            mean = features[:-1][labels == label].mean(0)
            cosines[label] = features[-1] @ mean / max(np.linalg.norm(mean), 1e-12)
        weights = np.exp((cosines - cosines.max()) / self.options.temperature)
        parts = [[demo for demo, label in zip(demos, labels, strict=True) if label == of] for of in range(number)]
        return list(zip((weights / weights.sum()).tolist(), parts, strict=True))


def _shown(sample: Sample) -> tuple[str, ...]:
    """Return what tells apart what samples show: images by the digest of their bytes where it is known, or the text."""
    return tuple(image.sha256 or image.path for image in sample.images) or (sample.question or "",)
