"""What operators of a classifier and of its gradient become for engines."""
