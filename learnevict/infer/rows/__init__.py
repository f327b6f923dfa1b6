"""The rows of a batch: what each has read, where its text has gaps, and when it has ended."""
