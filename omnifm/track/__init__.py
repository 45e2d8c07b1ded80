"""What a run leaves behind: resolved config, environment, split, events, checkpoint, scores."""
