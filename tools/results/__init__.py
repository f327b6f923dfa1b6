"""Programs that write docs/results.md from rows and benchmark files."""
