"""The equations of the pipeline as pure functions: no models, no configuration, no files."""
