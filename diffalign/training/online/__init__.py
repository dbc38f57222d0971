"""Training on images that the policy draws itself: rollouts, judges, people, rounds."""
