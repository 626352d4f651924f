"""What the features are worth: features, knn, spectrum, and the protocol that joins them."""
