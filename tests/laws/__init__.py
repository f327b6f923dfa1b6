"""What the law tests share: tiny models, the methods as the laws run them, one recorded run, and attention with naive masks."""
