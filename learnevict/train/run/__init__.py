"""What a training program needs besides data and losses: arguments, launch, setup, resuming, the table of trainable methods."""
