"""What a training program needs besides data and losses: flags, launch, setup, resuming, estimates, trainable methods."""
