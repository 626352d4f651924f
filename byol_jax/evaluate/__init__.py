"""What the features are worth: features, knn, neighbours."""
