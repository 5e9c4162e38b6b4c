"""Pure functions of tensors: no model, no configuration, no input or output."""
