"""What a cell's number can be besides a score: costs, distances, hallucination; one file a measure."""

from __future__ import annotations

from pipeline.measure.base import Measure, MeasureJob, measures

__all__ = ["Measure", "MeasureJob", "measures"]
