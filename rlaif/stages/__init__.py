"""The stages of a run: one module, one command, one recipe section and one output folder each, all of one name."""
