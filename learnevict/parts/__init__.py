"""The library of policy words: scorers, allocators, schedules, budgets and the networks of gates."""
