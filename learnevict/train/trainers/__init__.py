"""One trainer for each way of training a gate."""
