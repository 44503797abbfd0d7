"""Studies: a claim of the papers as a YAML file, and what this code measures of it."""
