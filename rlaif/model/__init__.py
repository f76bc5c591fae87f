"""The one base model in memory: loading, roles, sampling and scoring."""
