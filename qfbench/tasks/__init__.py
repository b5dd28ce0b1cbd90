"""What a run does: one file a task, and what they share."""
