"""Where keys, values and per-slot state lie: a uniform pool of slots, or pages for heads of different size."""
