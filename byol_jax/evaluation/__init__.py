"""What the features are worth: every protocol, the table of a run, and the monitors."""
