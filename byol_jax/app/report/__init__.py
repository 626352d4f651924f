"""How a run explains itself: metrics, progress, pictures and report.html."""
