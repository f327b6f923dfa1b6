"""Data for training: documents, label store, self-generated answers; opening a model by name."""
