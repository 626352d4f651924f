"""What is learned: networks and loss."""
