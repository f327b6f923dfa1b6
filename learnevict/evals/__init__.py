"""Measuring policies: tasks, teacher-forced and free runs, perplexity, one per-sample log, intervals, tables and plots."""
