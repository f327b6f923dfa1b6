"""Running a model under a policy: cache and hooks, the event loop, replay, generation."""
