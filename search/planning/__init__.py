"""Which trial is worth the next epoch: coordinates of configurations, curves of all trials together, pausing."""
