"""Learning: objectives, the label store and trainers whose model is the gates alone."""
