"""What one runs beside the stages: looking at runs, measuring, planning, a local hub."""
