"""How good a model is: accuracy, mean@k and pass@k with 95 % intervals, question by question."""
