"""What is known of a model: attention modules, layers that may evict, fingerprint of the weights, bytes."""
