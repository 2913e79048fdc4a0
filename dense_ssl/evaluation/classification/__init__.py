"""One label an image: nearest neighbours, linear classifiers, support vectors, few labels, fine-tuning."""
