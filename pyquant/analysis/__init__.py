"""What quantization does to the signals of a model, on plain modules."""
