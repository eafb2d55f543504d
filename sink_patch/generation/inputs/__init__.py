"""How the inputs of each forward of a call are made, by transformers' own `prepare_inputs_for_generation`."""
