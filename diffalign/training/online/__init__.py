"""Training on images that the policy draws: rollouts, rewards, people, rounds."""
