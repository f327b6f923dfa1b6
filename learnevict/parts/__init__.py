"""Components that methods are made of: scorers, allocators, selection, options and the networks of gates."""
