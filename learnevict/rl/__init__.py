"""Refinement of slot scorers by policy gradient: eviction as a decision process on TRL's GRPOTrainer.

What runs by default is not GRPO to the letter. Its credit ("attention") replaces TRL's group advantages, one number per trace,
by an advantage per eviction; the only thing kept of the group is its mean cost at every token, which is the baseline. And as
every batch of traces is used for one update, the ratio to the sampling policy is always 1 and clipping never acts (unless
--num_iterations or --steps_per_generation make further updates of a batch). So the default is REINFORCE with a per-token group
baseline, run by TRL's loop. `--credit trace` restores the group advantages of GRPO and of ForesightKV (arXiv 2602.03203), and
`--cost thresholded` the paper's reward.

config         settings
distribution   the law by which evictions are sampled, and its exact log-probability
trajectory     the sampling policy, and traces of a batch of texts that it samples in one forward
rewards        what a trace costs the language model, token by token, and credit assignment
rollout        one batch of experience, over given texts or in free generation
trainer        TRL's GRPOTrainer over all of that
refine         the program
"""
