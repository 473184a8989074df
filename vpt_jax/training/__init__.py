"""Training: the step, the loop, the schedule, checkpoints of a run and what a run writes down."""
