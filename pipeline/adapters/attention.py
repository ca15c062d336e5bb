"""The two functions of `pipeline.attention` that are public, under the name that they have had from the beginning."""

from pipeline.attention.virtual import merge_attention, mimic_attention

__all__ = ["merge_attention", "mimic_attention"]
