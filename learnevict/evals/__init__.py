"""Judging policies: teacher-forced and free runs of the testbed, perplexity, intervals, tables and plots.

suite.run(plan, model, tokenizer, methods, out)    rows of numbers, crash-safe
metrics                                               accuracy, intervals, gap closed, paired tests
report, sections, goals, tables                       what people read
hindsight, label_table                                other labels than golden, tried on texts
"""
