"""`Pack`: adapters that share one frozen backbone, and `PackRows`: which of them each row of a batch uses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, repeat
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.base import Adapter
from pipeline.backbones.base import placed
from pipeline.core.errors import InputError


@dataclass(frozen=True)
class PackRows:
    """What a pack has to know of the rows of the next forward pass.

    Attributes:
        adapters: the number in the pack of each row's adapter. In `generate` with beams a row's beams follow it.
        images: how many images each row has, for adapters of a vision tower; () says one each.
        widths: by adapter, the length of its rows where it is alone; what is longer here is padding.

    Raises:
        InputError: another number of rows in `images`.
    """

    adapters: tuple[int, ...]
    images: tuple[int, ...] = ()
    widths: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images and len(self.images) != len(self.adapters):
            raise InputError(f"{len(self.adapters)} rows, and {len(self.images)} numbers of images")


class Pack:
    """Adapters that share one frozen backbone; each row of a batch uses its own (`PackRows`).

    Args:
        adapters: one, or several of packable methods (methods, sizes and variants may differ).
        rows: of the first forward passes; none is needed with a single adapter.
        fixed: the parameters stay as they are, so that what is made of them is made once; for a server.
        apart: each adapter computes on its own rows, by the operators and in the shapes that it has alone; rows of one
            adapter stand together. Only the frozen modules see all rows.

    Attributes:
        watch: is shown what virtual tokens weigh in each layer of a pass: (layer, [B, H, T, n]).
        without: virtual tokens that count as absent, [L, n] bool, as if their keys were infinitely far.

    Raises:
        InputError: a method that does not pack, or rows that name no adapter.
    """

    watch: Callable[[int, Tensor], None] | None = None
    without: Tensor | None = None

    def __init__(
        self, adapters: Adapter | Sequence[Adapter], rows: PackRows | Sequence[int] | None = None, *,
        fixed: bool = False, apart: bool = False,
    ) -> None:  # fmt: skip
        self.adapters: list[Adapter] = [adapters] if isinstance(adapters, Adapter) else list(adapters)
        if not self.adapters:
            raise InputError("a pack needs an adapter")
        if len(self.adapters) > 1:
            for adapter in self.adapters:
                if not adapter.packable:
                    raise InputError(f"method '{adapter.name}' does not pack", way_out="Attach it alone")
        self.apart = apart and len(self.adapters) > 1
        self._rows: PackRows | None = None
        self._placed: dict[Hashable, Tensor] = {}  # of the rows, on their devices
        self._made: dict[Hashable, Any] | None = {} if fixed else None
        self._seeds: dict[int, int] = {}
        self._generators: dict[int, torch.Generator] = {}
        if rows is not None:
            self.use(rows)

    @property
    def rows(self) -> PackRows | None:
        """The rows of the next forward passes; set by `use` alone."""
        return self._rows

    def use(self, rows: PackRows | Sequence[int]) -> None:
        """Say which adapter each row of the next forward passes uses.

        Args:
            rows: all that there is to say, or the numbers of the adapters alone.

        Raises:
            InputError: a row names no adapter.
        """
        if not isinstance(rows, PackRows):
            rows = PackRows(tuple(int(number) for number in rows))
        if not rows.adapters or min(rows.adapters) < 0 or max(rows.adapters) >= len(self.adapters):
            last = len(self.adapters) - 1
            raise InputError(f"rows must be adapter numbers from 0 to {last}, one for each row of the batch")
        self._rows, self._placed = rows, {}

    @property
    def numbers(self) -> tuple[int, ...]:
        """The adapter of each row of the next forward passes."""
        return () if self._rows is None else self._rows.adapters

    @property
    def state(self) -> tuple[Hashable, object]:
        """What decides how a pass computes besides parameters and inputs; and the tensors that it reads, to be kept."""
        return None if self._rows is None else self._rows.adapters, self._placed

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` gives of the parameters, anew each time, or the first where they are fixed."""
        if self._made is None:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def of_each_row(self, key: Hashable, stacked: Tensor, rows: Tensor) -> Tensor:
        """Return each row's part of what is stacked by adapter; fixed ones are kept for as long as the rows are."""
        if self._made is None:
            return stacked.index_select(0, rows)
        if (key, len(rows)) not in self._placed:
            self._placed[key, len(rows)] = stacked.index_select(0, rows)
        return self._placed[key, len(rows)]

    def seed(self, seeds: Mapping[int, int]) -> None:
        """Start each adapter's stream of dropout masks anew; `seeds` by the adapter's number."""
        self._seeds, self._generators = dict(seeds), {}

    def generator(self, number: int, device: torch.device) -> torch.Generator:
        """Return one adapter's stream of dropout masks."""
        if number not in self._generators:
            seed = self._seeds.get(number, torch.initial_seed())
            self._generators[number] = torch.Generator(device).manual_seed(seed)
        return self._generators[number]

    def width_of(self, number: int, padded: int) -> int:
        """Return how long one adapter's rows are without the others', in a batch of length `padded`."""
        return padded if self._rows is None else min(self._rows.widths.get(number, padded), padded)

    def of_rows(self, batch: int, device: torch.device) -> Tensor | None:
        """Return the adapter of each row of a batch of `batch`, [batch]; None where there is one adapter alone.

        Raises:
            InputError: several adapters and no rows, or a batch of another size.
        """
        if len(self.adapters) == 1:
            return None
        if self._rows is None:
            raise InputError(
                f"{len(self.adapters)} adapters are attached and no row says which it uses",
                way_out="Call pack.use(rows) before the forward pass",
            )
        numbers = self._rows.adapters
        if batch % len(numbers):
            raise InputError(f"the batch has {batch} rows and the pack was told of {len(numbers)}")
        key = (batch, device)
        if key not in self._placed:
            self._placed[key] = placed(torch.tensor(self._numbers(batch)), device)
        return self._placed[key]

    def flagged(self, flags: Sequence[bool], batch: int, device: torch.device) -> Tensor:
        """Return each row's flag, [batch], of `flags` by adapter; made once for all layers of the next passes."""
        key = (batch, device, *flags)
        if key not in self._placed:
            self._placed[key] = placed(torch.tensor([flags[number] for number in self._numbers(batch)]), device)
        return self._placed[key]

    def places_of(self, number: int, count: int, device: torch.device, *, images: bool) -> Tensor:
        """Return which of a batch's `count` rows, or images, are one adapter's; made once for all modules."""
        key = (number, count, device, images)
        if key not in self._placed:
            numbers = self._image_numbers() if images else self._numbers(count)
            places = [place for place, adapter in enumerate(numbers) if adapter == number]
            self._placed[key] = placed(torch.tensor(places, dtype=torch.long), device)
        return self._placed[key]

    def _numbers(self, batch: int) -> list[int]:
        """Return the adapter of each row of a batch of `batch`: in `generate` with beams a row's beams follow it."""
        numbers = () if self._rows is None else self._rows.adapters
        return [number for number in numbers for _ in range(batch // len(numbers))]

    def _image_numbers(self) -> list[int]:
        rows = self._rows
        if rows is None or len(self.adapters) == 1:
            return []
        return [number for number, n in zip(rows.adapters, rows.images or repeat(1), strict=False) for _ in range(n)]

    def split(self, x: Tensor, tokens: int | None = None) -> list[tuple[int, Tensor]]:
        """Return each adapter's number and its rows of x [B, ...], in the length that they have alone.

        Args:
            x: of all rows, or, where nothing is padded, of all images.
            tokens: the dimension that is padded.

        Raises:
            InputError: as `of_rows`, or `of_images`.
        """
        (self.of_images if tokens is None else self.of_rows)(x.shape[0], x.device)  # whether the pack was told of them
        numbers = self._image_numbers() if tokens is None else self._numbers(x.shape[0])
        counts = [(number, len(list(rows))) for number, rows in groupby(numbers)]
        parts = list(zip([number for number, _ in counts], x.split([count for _, count in counts]), strict=True))
        if tokens is None:
            return parts
        return [(number, part.narrow(tokens, 0, self.width_of(number, x.shape[tokens]))) for number, part in parts]

    def of_images(self, count: int, device: torch.device) -> Tensor:
        """Return the adapter of each image of a batch of `count`, [count].

        Raises:
            InputError: the vision tower sees another number: one that cuts images into tiles does not pack.
        """
        numbers = self._image_numbers()
        if not numbers or len(numbers) != count:
            raise InputError(
                f"the vision tower sees {count} pictures and the rows have {len(numbers)}",
                way_out="Train adapters of this backbone's vision tower alone (sweep.pack: 1)",
            )
        key = ("images", device)
        if key not in self._placed:
            self._placed[key] = placed(torch.tensor(numbers), device)
        return self._placed[key]


def joined(parts: Sequence[Tensor], width: int) -> Tensor:
    """Return what `Pack.split` gave, [B_k, T_k, ...], as one tensor [B, width, ...], zeros behind the shorter rows."""
    missing = [width - part.shape[1] for part in parts]
    padded = [
        torch.nn.functional.pad(part, (*(0, 0) * (part.dim() - 2), 0, n)) if n else part
        for part, n in zip(parts, missing, strict=True)
    ]
    return torch.cat(padded)
