"""What a merge learns from unlabelled texts: weights, factors, heads; and where interrupted learning goes on."""
