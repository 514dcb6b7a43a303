"""Pictures of what the database holds: plots, contact sheets, annotated videos."""
