"""Samples: from official files, and the user's own, to manifests; and the images that they name."""

MAX_PIXELS = 110_000_000  # the largest cameras' pictures; COCO's largest have 0.4 million. At most 1 GiB to decode one
